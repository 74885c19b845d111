// Which GPUs are served, and what the others are told.
#include <gtest/gtest.h>

#include "cuda/cuda.h"
#include "tests/testing.h"

namespace phalanx::test {
namespace {

TEST(Device, OthersThanHopperAreNamed) {
  const cuda::DeviceInfo ada{.ordinal = 1, .name = "NVIDIA L4", .major = 8, .minor = 9};  // which has no WGMMA
  expect_error(ErrorCode::unsupported, {"cuda:1", "NVIDIA L4", "8.9", "9.0"}, [&] { cuda::check_supported(ada); });
  EXPECT_THROW(cuda::check_supported({.ordinal = 0, .name = "NVIDIA B200", .major = 10, .minor = 0}), Error);
  EXPECT_NO_THROW(cuda::check_supported({.ordinal = 0, .name = "NVIDIA H200", .major = 9, .minor = 0}));
}

TEST(Device, ArchitectureOfKernels) {
  EXPECT_EQ((cuda::DeviceInfo{.major = 9, .minor = 0}.arch()), "sm_90a");
  EXPECT_EQ((cuda::DeviceInfo{.major = 8, .minor = 9}.arch()), "sm_89");
}

}  // namespace
}  // namespace phalanx::test
