// The part of the CUDA driver API that we use, declared here and loaded with dlopen: the library builds without CUDA
// and loads where no driver is. tests/cpu/test_driver_abi.cpp compares these declarations with <cuda.h> where there is
// one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace phalanx::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUfunction = struct CUfunc_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;

constexpr CUresult kSuccess = 0, kNotReady = 600, kPeerAccessAlreadyEnabled = 704;

struct IpcMemHandle {
  char bytes[64];
};
constexpr unsigned kIpcMemLazyEnablePeerAccess = 1, kStreamNonBlocking = 1;
constexpr unsigned kMemHostAllocPortable = 1, kMemHostAllocDeviceMap = 2;

// CUdevice_attribute, CUfunction_attribute
constexpr int kAttributeClockRate = 13, kAttributeMultiprocessorCount = 16, kAttributeL2CacheSize = 38,
              kAttributeComputeCapabilityMajor = 75, kAttributeComputeCapabilityMinor = 76;
constexpr int kP2PPerformanceRank = 1, kP2PAccessSupported = 2, kP2PNativeAtomicSupported = 3;
constexpr int kFuncAttributeMaxDynamicSharedSizeBytes = 8;

// CUlaunchAttribute, CUlaunchConfig
constexpr int kLaunchAttributeClusterDimension = 4, kLaunchAttributeProgrammaticStreamSerialization = 6;
struct LaunchAttribute {
  int id = 0;
  char pad[4] = {};
  union Value {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster_dim;
    int programmatic_stream_serialization_allowed;
  } value = {};
};
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_mem_bytes;
  CUstream stream;
  LaunchAttribute* attrs;
  unsigned num_attrs;
};

// CUtensorMap*
constexpr int kTensorMapUint8 = 0, kTensorMapFloat32 = 7, kTensorMapBfloat16 = 9;
constexpr int kTensorMapSwizzleNone = 0, kTensorMapSwizzle64B = 2, kTensorMapSwizzle128B = 3,
              kTensorMapL2Promotion128B = 2, kTensorMapL2Promotion256B = 3;

#define PHALANX_DRIVER_FUNCTIONS(F)                                                                                   \
  F(cuInit, "cuInit", (unsigned flags))                                                                               \
  F(cuDriverGetVersion, "cuDriverGetVersion", (int* version))                                                         \
  F(cuGetErrorName, "cuGetErrorName", (CUresult error, const char** text))                                            \
  F(cuGetErrorString, "cuGetErrorString", (CUresult error, const char** text))                                        \
  F(cuDeviceGetCount, "cuDeviceGetCount", (int* count))                                                               \
  F(cuDeviceGet, "cuDeviceGet", (CUdevice * device, int ordinal))                                                     \
  F(cuDeviceGetName, "cuDeviceGetName", (char* name, int length, CUdevice device))                                    \
  F(cuDeviceTotalMem, "cuDeviceTotalMem_v2", (std::size_t * bytes, CUdevice device))                                  \
  F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int* value, int attribute, CUdevice device))                       \
  F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device))                     \
  F(cuCtxGetCurrent, "cuCtxGetCurrent", (CUcontext * context))                                                        \
  F(cuCtxSetCurrent, "cuCtxSetCurrent", (CUcontext context))                                                          \
  F(cuCtxGetDevice, "cuCtxGetDevice", (CUdevice * device))                                                            \
  F(cuCtxSynchronize, "cuCtxSynchronize", ())                                                                         \
  F(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr * pointer, std::size_t bytes))                                          \
  F(cuMemFree, "cuMemFree_v2", (CUdeviceptr pointer))                                                                 \
  F(cuMemcpyHtoD, "cuMemcpyHtoD_v2", (CUdeviceptr to, const void* from, std::size_t bytes))                           \
  F(cuMemcpyDtoH, "cuMemcpyDtoH_v2", (void* to, CUdeviceptr from, std::size_t bytes))                                 \
  F(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream stream))    \
  F(cuMemHostAlloc, "cuMemHostAlloc", (void** pointer, std::size_t bytes, unsigned flags))                            \
  F(cuMemFreeHost, "cuMemFreeHost", (void* pointer))                                                                  \
  F(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void* to, CUdeviceptr from, std::size_t bytes, CUstream stream))      \
  F(cuDeviceCanAccessPeer, "cuDeviceCanAccessPeer", (int* can, CUdevice from, CUdevice to))                           \
  F(cuDeviceGetP2PAttribute, "cuDeviceGetP2PAttribute", (int* value, int attribute, CUdevice from, CUdevice to))      \
  F(cuCtxEnablePeerAccess, "cuCtxEnablePeerAccess", (CUcontext peer, unsigned flags))                                 \
  F(cuIpcGetMemHandle, "cuIpcGetMemHandle", (IpcMemHandle * handle, CUdeviceptr pointer))                             \
  F(cuIpcOpenMemHandle, "cuIpcOpenMemHandle_v2", (CUdeviceptr * pointer, IpcMemHandle handle, unsigned flags))        \
  F(cuIpcCloseMemHandle, "cuIpcCloseMemHandle", (CUdeviceptr pointer))                                                \
  F(cuStreamCreate, "cuStreamCreate", (CUstream * stream, unsigned flags))                                            \
  F(cuStreamDestroy, "cuStreamDestroy_v2", (CUstream stream))                                                         \
  F(cuStreamQuery, "cuStreamQuery", (CUstream stream))                                                                \
  F(cuStreamSynchronize, "cuStreamSynchronize", (CUstream stream))                                                    \
  F(cuEventCreate, "cuEventCreate", (CUevent * event, unsigned flags))                                                \
  F(cuEventDestroy, "cuEventDestroy_v2", (CUevent event))                                                             \
  F(cuEventRecord, "cuEventRecord", (CUevent event, CUstream stream))                                                 \
  F(cuEventSynchronize, "cuEventSynchronize", (CUevent event))                                                        \
  F(cuEventElapsedTime, "cuEventElapsedTime", (float* ms, CUevent start, CUevent end))                                \
  F(cuLibraryLoadData, "cuLibraryLoadData",                                                                           \
    (CUlibrary * library, const void* code, int* jit_options, void** jit_values, unsigned num_jit_options,            \
     int* library_options, void** library_values, unsigned num_library_options))                                      \
  F(cuLibraryGetKernel, "cuLibraryGetKernel", (CUkernel * kernel, CUlibrary library, const char* name))               \
  F(cuKernelGetFunction, "cuKernelGetFunction", (CUfunction * function, CUkernel kernel))                             \
  F(cuKernelSetAttribute, "cuKernelSetAttribute", (int attribute, int value, CUkernel kernel, CUdevice device))       \
  F(cuLaunchKernelEx, "cuLaunchKernelEx",                                                                             \
    (const LaunchConfig* config, CUfunction function, void** params, void** extra))                                   \
  F(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                                                 \
    (void* map, int type, std::uint32_t rank, void* address, const std::uint64_t* dims, const std::uint64_t* strides, \
     const std::uint32_t* box, const std::uint32_t* element_strides, int interleave, int swizzle, int l2_promotion,   \
     int oob_fill))

struct Driver {
#define PHALANX_DECLARE(name, symbol, arguments) CUresult(*name) arguments = nullptr;
  PHALANX_DRIVER_FUNCTIONS(PHALANX_DECLARE)
#undef PHALANX_DECLARE
};

/// The loaded, initialised driver.
/// @throws Error unsupported, saying what is missing
const Driver& driver();

/// Of a device that exists: its handle, and its primary context.
CUdevice handle_of(int ordinal);
CUcontext context_of(int ordinal);

/// Throws Error cuda_error naming `call` unless `result` is success.
void check(CUresult result, const char* call);

}  // namespace phalanx::cuda

/// PHALANX_CUDA(cuMemFree(p)): the call through the driver table, checked.
#define PHALANX_CUDA(call) ::phalanx::cuda::check(::phalanx::cuda::driver().call, #call)
