// Which GPUs are served, and what the others are told.
#include <gtest/gtest.h>

#include "ops/kernel.h"
#include "phalanx/status.h"

namespace phalanx {
namespace {

TEST(Device, OthersThanHopperAreNamed) {
  const cuda::DeviceInfo ada{.ordinal = 1, .name = "NVIDIA L4", .major = 8, .minor = 9};
  try {
    check_supported(ada);
    FAIL() << "an L4 has no WGMMA";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    for (const char* part : {"cuda:1", "NVIDIA L4", "8.9", "9.0"})
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << part << " in " << error.what();
  }
  EXPECT_THROW(check_supported({.ordinal = 0, .name = "NVIDIA B200", .major = 10, .minor = 0}), Error);
  EXPECT_NO_THROW(check_supported({.ordinal = 0, .name = "NVIDIA H200", .major = 9, .minor = 0}));
}

TEST(Device, ArchitectureOfKernels) {
  EXPECT_EQ((cuda::DeviceInfo{.major = 9, .minor = 0}.arch()), "sm_90a");
  EXPECT_EQ((cuda::DeviceInfo{.major = 8, .minor = 9}.arch()), "sm_89");
}

}  // namespace
}  // namespace phalanx
