// Our declarations of the CUDA driver API against the real header, where there is one.
#include <gtest/gtest.h>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "device/ptx/tensor_map.h"
#include "phalanx/status.h"

#if __has_include(<cuda.h>)
#include <cuda.h>

namespace ours = phalanx::cuda;

static_assert(sizeof(ours::LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(alignof(ours::LaunchConfig) == alignof(CUlaunchConfig) &&
              sizeof(ours::LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(ours::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(offsetof(ours::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(ours::LaunchConfig, attrs) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(ours::LaunchConfig, num_attrs) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(phalanx::TensorMap) == sizeof(CUtensorMap) && alignof(phalanx::TensorMap) >= alignof(CUtensorMap));
static_assert(sizeof(ours::IpcMemHandle) == sizeof(CUipcMemHandle));

TEST(DriverAbi, ConstantsAreTheHeaders) {
  EXPECT_EQ(ours::kP2PPerformanceRank, CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK);
  EXPECT_EQ(ours::kP2PAccessSupported, CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED);
  EXPECT_EQ(ours::kP2PNativeAtomicSupported, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED);
  EXPECT_EQ(ours::kNotReady, CUDA_ERROR_NOT_READY);
  EXPECT_EQ(ours::kPeerAccessAlreadyEnabled, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
  EXPECT_EQ(ours::kIpcMemLazyEnablePeerAccess, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  EXPECT_EQ(ours::kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
  EXPECT_EQ(ours::kMemHostAllocPortable, CU_MEMHOSTALLOC_PORTABLE);
  EXPECT_EQ(ours::kMemHostAllocDeviceMap, CU_MEMHOSTALLOC_DEVICEMAP);
  EXPECT_EQ(ours::kSuccess, CUDA_SUCCESS);
  EXPECT_EQ(ours::kAttributeClockRate, CU_DEVICE_ATTRIBUTE_CLOCK_RATE);
  EXPECT_EQ(ours::kAttributeMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  EXPECT_EQ(ours::kAttributeL2CacheSize, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  EXPECT_EQ(ours::kAttributeComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  EXPECT_EQ(ours::kAttributeComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  EXPECT_EQ(ours::kFuncAttributeMaxDynamicSharedSizeBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
  EXPECT_EQ(ours::kLaunchAttributeClusterDimension, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
  EXPECT_EQ(ours::kLaunchAttributeProgrammaticStreamSerialization,
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
  EXPECT_EQ(ours::kTensorMapUint8, CU_TENSOR_MAP_DATA_TYPE_UINT8);
  EXPECT_EQ(ours::kTensorMapFloat32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
  EXPECT_EQ(ours::kTensorMapSwizzleNone, CU_TENSOR_MAP_SWIZZLE_NONE);
  EXPECT_EQ(ours::kTensorMapBfloat16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  EXPECT_EQ(ours::kTensorMapSwizzle128B, CU_TENSOR_MAP_SWIZZLE_128B);
  EXPECT_EQ(ours::kTensorMapL2Promotion256B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}
#else
TEST(DriverAbi, ConstantsAreTheHeaders) { GTEST_SKIP() << "no <cuda.h> on this machine"; }
#endif

TEST(Driver, AbsenceIsExplained) {
  const auto info = phalanx::cuda::driver_info();
  if (info.available) GTEST_SKIP() << "there is a driver";
  EXPECT_NE(info.error.find("driver"), std::string::npos) << info.error;
  EXPECT_TRUE(phalanx::cuda::devices().empty());
  EXPECT_THROW(phalanx::cuda::device(0), phalanx::Error);
}
