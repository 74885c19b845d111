// A driver that pretends: libcuda.so.1 with three devices, for the host's side of CUDA on a machine without a GPU.
// Device memory is the host's. Kernels do not run, but their launches and tensor maps are held to the rules of the real
// driver. A kernel "takes" a microsecond for each CTA.
#include "cuda/driver.h"
#include "device/gemm/params.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "tests/driver/driver.h"

using namespace phalanx::cuda;

namespace phalanx::test {

PretendedDriver& pretended_driver() {
  static PretendedDriver instance;
  return instance;
}

}  // namespace phalanx::test

namespace {

using phalanx::test::pretended_driver;

constexpr CUresult kInvalidValue = 1, kInvalidImage = 200, kNotFound = 500;
constexpr unsigned kMaxSmem = 227 << 10, kMaxThreads = 1024, kMaxCluster = 8;

thread_local CUcontext current = nullptr;

// Handles are numbers from 1 on: of contexts, the device's; of libraries and kernels, that of the load.
template <class Handle>
Handle to_handle(int number) {
  return reinterpret_cast<Handle>(static_cast<std::intptr_t>(number));
}
int device_of(CUcontext context) { return static_cast<int>(reinterpret_cast<std::intptr_t>(context)) - 1; }

}  // namespace

extern "C" {

// NVRTC asks for it where it finds a driver, and does without.
CUresult cuGetExportTable(const void**, const void*) { return kNotFound; }

CUresult cuDeviceGetCount(int* count) { return *count = phalanx::test::kDevices, kSuccess; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, kSuccess; }
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  std::snprintf(name, length, device < phalanx::test::kHoppers ? "Pretended H200" : "Pretended L4");
  return kSuccess;
}
CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  const bool hopper = device < phalanx::test::kHoppers;
  *value = attribute == kAttributeComputeCapabilityMajor   ? (hopper ? 9 : 8)
           : attribute == kAttributeComputeCapabilityMinor ? (hopper ? 0 : 9)
           : attribute == kAttributeMultiprocessorCount    ? phalanx::test::kSms
           : attribute == kAttributeL2CacheSize            ? 1 << 20
                                                           : 0;
  return kSuccess;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = to_handle<CUcontext>(device + 1), kSuccess;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = current, pretended_driver().context_error; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, kSuccess; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = device_of(current), kSuccess; }

CUresult cuMemHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  return *pointer = std::calloc(1, bytes), *pointer ? kSuccess : kInvalidValue;
}
CUresult cuMemAlloc_v2(CUdeviceptr* pointer, std::size_t bytes) {
  return *pointer = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), kSuccess;
}
CUresult cuMemFree_v2(CUdeviceptr pointer) { return std::free(reinterpret_cast<void*>(pointer)), kSuccess; }
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, std::size_t bytes) {
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), kSuccess;
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, std::size_t bytes) {
  return std::memcpy(to, reinterpret_cast<void*>(from), bytes), kSuccess;
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream) {
  return std::memset(reinterpret_cast<void*>(to), value, bytes), kSuccess;
}

// Processes are threads here, and a handle is an address.
CUresult cuIpcGetMemHandle(IpcMemHandle* handle, CUdeviceptr pointer) {
  return std::memcpy(handle->bytes, &pointer, sizeof pointer), kSuccess;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* pointer, IpcMemHandle handle, unsigned) {
  return std::memcpy(pointer, handle.bytes, sizeof *pointer), kSuccess;
}

CUresult cuEventElapsedTime(float* ms, CUevent, CUevent) {
  return *ms = static_cast<float>(pretended_driver().num_ctas) * 1e-3f, kSuccess;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  if (std::string_view(static_cast<const char*>(code), 4) !=
      "\x7f"
      "ELF")
    return kInvalidImage;
  return *library = to_handle<CUlibrary>(++pretended_driver().loads), kSuccess;
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char*) {
  return *kernel = reinterpret_cast<CUkernel>(library), kSuccess;
}

CUresult cuLaunchKernelEx(const LaunchConfig* config, CUfunction function, void** params, void**) {
  auto& driver = pretended_driver();
  if (driver.launch_error != 0) return driver.launch_error;
  unsigned cluster = 1;
  bool programmatic = false;
  for (unsigned i = 0; i < config->num_attrs; ++i) {
    const LaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == kLaunchAttributeClusterDimension) cluster = attribute.value.cluster_dim.x;
    if (attribute.id == kLaunchAttributeProgrammaticStreamSerialization)
      programmatic = attribute.value.programmatic_stream_serialization_allowed != 0;
  }
  const bool sound = function != nullptr && current != nullptr && config->grid_x > 0 && config->grid_y == 1 &&
                     config->grid_z == 1 && cluster >= 1 && cluster <= kMaxCluster && config->grid_x % cluster == 0 &&
                     config->block_x > 0 && config->block_x <= kMaxThreads && config->block_x % 32 == 0 &&
                     config->shared_mem_bytes <= kMaxSmem;
  if (!sound) return kInvalidValue;
  ++driver.launches;
  driver.device = device_of(current);
  driver.num_ctas = config->grid_x;
  driver.stream = config->stream;
  driver.programmatic = programmatic;
  driver.leaves_sms = static_cast<const phalanx::GemmParams*>(params[0])->leaves_sms != 0;
  return kSuccess;
}

CUresult cuTensorMapEncodeTiled(void* map, int type, std::uint32_t rank, void* address, const std::uint64_t* dims,
                                const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t*, int,
                                int swizzle, int, int) {
  const std::uint64_t size = type == kTensorMapUint8 ? 1 : type == kTensorMapBfloat16 ? 2 : 4;
  const std::uint64_t widest = swizzle == kTensorMapSwizzle128B  ? 128
                               : swizzle == kTensorMapSwizzle64B ? 64
                                                                 : 256 * size;
  bool sound = reinterpret_cast<std::uintptr_t>(map) % 64 == 0 && address != nullptr &&
               reinterpret_cast<std::uintptr_t>(address) % 16 == 0 && box[0] * size % 16 == 0 &&
               box[0] * size <= widest;
  for (std::uint32_t i = 0; i < rank; ++i) {
    sound = sound && dims[i] > 0 && dims[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256;
    if (i > 0) sound = sound && strides[i - 1] % 16 == 0 && strides[i - 1] < 1ull << 40;
  }
  return sound ? kSuccess : kInvalidValue;
}

}  // extern "C"
