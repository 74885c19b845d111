#include <algorithm>
#include <deque>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx::cuda {
namespace {

struct DeviceState {
  DeviceInfo info;
  CUdevice handle = 0;
  std::once_flag context_once;
  CUcontext primary_context = nullptr;
  std::shared_mutex kernels_mutex;
  std::unordered_map<std::string, Kernel> kernels;  // references stay valid while it grows
};

DeviceInfo read_info(int ordinal, CUdevice handle) {
  DeviceInfo d;
  d.ordinal = ordinal;
  char name[256] = {};
  PHALANX_CUDA(cuDeviceGetName(name, sizeof name - 1, handle));
  d.name = name;
  const auto attribute = [&](int which) {
    int value = 0;
    PHALANX_CUDA(cuDeviceGetAttribute(&value, which, handle));
    return value;
  };
  d.major = attribute(kAttributeComputeCapabilityMajor);
  d.minor = attribute(kAttributeComputeCapabilityMinor);
  d.num_sms = attribute(kAttributeMultiprocessorCount);
  d.clock_khz = attribute(kAttributeClockRate);
  d.l2_bytes = attribute(kAttributeL2CacheSize);
  PHALANX_CUDA(cuDeviceTotalMem(&d.memory_bytes, handle));
  return d;
}

std::deque<DeviceState>& states() {
  static std::deque<DeviceState>& all = *[] {
    auto* list = new std::deque<DeviceState>;
    int count = 0;
    PHALANX_CUDA(cuDeviceGetCount(&count));
    for (int i = 0; i < std::min(count, kMaxDevices); ++i) {
      DeviceState& state = list->emplace_back();
      PHALANX_CUDA(cuDeviceGet(&state.handle, i));
      state.info = read_info(i, state.handle);
    }
    return list;
  }();
  return all;
}

DeviceState& state_of(int ordinal) {
  auto& all = states();
  if (ordinal < 0 || ordinal >= static_cast<int>(all.size()))
    throw Error(ErrorCode::invalid_device,
                format_text("device cuda:{} does not exist: there are {}", ordinal, all.size()));
  return all[ordinal];
}

}  // namespace

std::string DeviceInfo::arch() const { return format_text("sm_{}{}{}", major, minor, major >= 9 ? "a" : ""); }

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> list;
  if (driver_info().available)
    for (const DeviceState& state : states()) list.push_back(state.info);
  return list;
}

const DeviceInfo& device(int ordinal) { return state_of(ordinal).info; }

void check_supported(const DeviceInfo& device) {
  if (!device.is_hopper())
    throw Error(ErrorCode::unsupported,
                format_text("cuda:{} is a {} of compute capability {}.{}; the kernels need Hopper, 9.0", device.ordinal,
                            device.name, device.major, device.minor));
}

const DeviceInfo& require_hopper(int ordinal) {
  const DeviceInfo& info = device(ordinal);
  check_supported(info);
  return info;
}

PeerInfo peer_info(int from, int to) {
  const auto attribute = [&](int which) {
    int value = 0;
    PHALANX_CUDA(cuDeviceGetP2PAttribute(&value, which, handle_of(from), handle_of(to)));
    return value;
  };
  return {attribute(kP2PAccessSupported) != 0, attribute(kP2PNativeAtomicSupported) != 0,
          attribute(kP2PPerformanceRank)};
}

CUdevice handle_of(int ordinal) { return state_of(ordinal).handle; }

CUcontext context_of(int ordinal) {
  DeviceState& state = state_of(ordinal);
  std::call_once(state.context_once,
                 [&] { PHALANX_CUDA(cuDevicePrimaryCtxRetain(&state.primary_context, state.handle)); });
  return state.primary_context;
}

ContextGuard::ContextGuard(int ordinal) {
  DeviceState& state = state_of(ordinal);
  CUcontext current = nullptr;
  CUdevice current_device = -1;
  PHALANX_CUDA(cuCtxGetCurrent(&current));
  if (current) PHALANX_CUDA(cuCtxGetDevice(&current_device));
  if (current_device == state.handle) return;
  PHALANX_CUDA(cuCtxSetCurrent(context_of(ordinal)));
  previous_ = current;
  restore_ = true;
}

ContextGuard::~ContextGuard() {
  if (restore_) driver().cuCtxSetCurrent(static_cast<CUcontext>(previous_));
}

const Kernel& kernel(int ordinal, const std::string& name, const char* entry_point, int smem_bytes,
                     const std::function<std::shared_ptr<const std::string>()>& load) {
  DeviceState& state = state_of(ordinal);
  {
    std::shared_lock lock(state.kernels_mutex);
    if (const auto it = state.kernels.find(name); it != state.kernels.end()) return it->second;
  }
  const auto cubin = load();  // outside the lock: may take a compilation
  std::unique_lock lock(state.kernels_mutex);
  if (const auto it = state.kernels.find(name); it != state.kernels.end()) return it->second;
  CUlibrary library = nullptr;
  CUkernel handle = nullptr;
  CUfunction function = nullptr;
  PHALANX_CUDA(cuLibraryLoadData(&library, cubin->data(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  PHALANX_CUDA(cuLibraryGetKernel(&handle, library, entry_point));
  PHALANX_CUDA(cuKernelSetAttribute(kFuncAttributeMaxDynamicSharedSizeBytes, smem_bytes, handle, state.handle));
  PHALANX_CUDA(cuKernelGetFunction(&function, handle));  // loads it now: a graph capture could not
  Kernel result;
  result.handle_ = handle;
  return state.kernels.emplace(name, result).first->second;
}

void Kernel::launch(const LaunchShape& shape, const void* params, void* stream) const {
  LaunchAttribute attributes[2];
  attributes[0].id = kLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].value.programmatic_stream_serialization_allowed = 1;
  attributes[1].id = kLaunchAttributeClusterDimension;
  attributes[1].value.cluster_dim = {unsigned(shape.cluster_size), 1, 1};
  LaunchConfig config{};
  config.grid_x = shape.num_ctas;
  config.grid_y = config.grid_z = config.block_y = config.block_z = 1;
  config.block_x = shape.num_threads;
  config.shared_mem_bytes = shape.smem_bytes;
  config.stream = static_cast<CUstream>(stream);
  config.attrs = attributes;
  config.num_attrs = shape.cluster_size > 1 ? 2 : 1;
  void* arguments[] = {const_cast<void*>(params)};
  // A CUkernel stands for itself in every context (CUDA driver API, "Library Management").
  PHALANX_CUDA(cuLaunchKernelEx(&config, static_cast<CUfunction>(handle_), arguments, nullptr));
}

namespace {

TensorMap encode_tensor_map(const TensorMapSpec& spec) {
  TensorMap map;
  const std::uint64_t dims[2] = {std::uint64_t(spec.cols), std::uint64_t(spec.rows)};
  const std::uint64_t strides[1] = {std::uint64_t(spec.row_stride_bytes)};
  const std::uint32_t box[2] = {std::uint32_t(spec.box_cols), std::uint32_t(spec.box_rows)}, ones[2] = {1, 1};
  const int type = spec.dtype == DType::bf16  ? kTensorMapBfloat16
                   : spec.dtype == DType::f32 ? kTensorMapFloat32
                                              : kTensorMapUint8;
  const int swizzle = spec.dtype == DType::f32 && spec.box_rows == 1   ? kTensorMapSwizzleNone  // scales
                      : spec.box_cols * int(size_of(spec.dtype)) == 64 ? kTensorMapSwizzle64B
                                                                       : kTensorMapSwizzle128B;
  const int promotion = spec.read_once ? kTensorMapL2Promotion128B : kTensorMapL2Promotion256B;
  PHALANX_CUDA(cuTensorMapEncodeTiled(&map, type, 2, const_cast<void*>(spec.data), dims, strides, box, ones, 0, swizzle,
                                      promotion, 0));
  return map;
}

}  // namespace

TensorMap make_tensor_map(const TensorMapSpec& spec) {
  struct Entry {
    TensorMapSpec spec{};
    TensorMap map{};
  };
  static thread_local Entry cache[256];  // by address: a collision costs an encoding, 50 ns
  const auto key = (reinterpret_cast<std::uintptr_t>(spec.data) >> 4) + (std::uintptr_t(spec.box_rows) << 40);
  Entry& entry = cache[key * 0x9e3779b97f4a7c15ull >> 56];
  if (entry.spec != spec) entry = {spec, encode_tensor_map(spec)};
  return entry.map;
}

}  // namespace phalanx::cuda
