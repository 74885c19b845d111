// The CUDA runtime layer: devices, kernels, launches, tensor maps. No CUDA header is needed to build, no driver to
// load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "device/ptx/tensor_map.h"
#include "phalanx/status.h"
#include "phalanx/tensor.h"

namespace phalanx::cuda {

struct DriverInfo {
  bool available = false;
  int version = 0;    ///< 13000 for CUDA 13.0
  std::string error;  ///< why not, when unavailable
};
DriverInfo driver_info();

struct DeviceInfo {
  int ordinal = 0;
  std::string name{};
  int major = 0, minor = 0, num_sms = 0, clock_khz = 0;
  std::size_t memory_bytes = 0, l2_bytes = 0;

  bool is_hopper() const { return major == 9 && minor == 0; }
  std::string arch() const;  ///< "sm_90a"
};
constexpr int kMaxDevices = 64;
/// At most kMaxDevices; empty when there is no driver or no GPU.
std::vector<DeviceInfo> devices();
/// @throws Error unsupported (no driver), invalid_device
const DeviceInfo& device(int ordinal);

/// Throws Error unsupported, naming the GPU, unless our kernels run on it.
void check_supported(const DeviceInfo& device);
/// The device, if our kernels run there.
/// @throws Error unsupported, invalid_device
const DeviceInfo& require_hopper(int ordinal);

/// How one device reaches another's memory. Both exist.
struct PeerInfo {
  bool access = false;
  bool atomics = false;      ///< over the link: NVLink has them, PCIe has not
  int performance_rank = 0;  ///< lower is quicker
};
PeerInfo peer_info(int from, int to);

/// Makes a context of the device current, the caller's own if it is one of that device, until the end of the scope.
class ContextGuard {
 public:
  explicit ContextGuard(int ordinal);
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  void* previous_ = nullptr;
  bool restore_ = false;
};

/// Frees in a destructor: calls `free` with a context of the device. Not at the end of a process whose driver has
/// already gone, and everything with it.
template <class Free>
void release(int ordinal, const Free& free) noexcept {
  try {
    const ContextGuard context(ordinal);
    free();
  } catch (const Error&) {
  }
}

struct LaunchShape {
  int num_ctas = 1, num_threads = 128, cluster_size = 1, smem_bytes = 0;
};

/// A kernel on one device.
class Kernel {
 public:
  /// Enqueues with programmatic dependent launch: the kernel must wait for its predecessor before it touches memory.
  /// The device's context is current; `params` is the kernel's one parameter.
  void launch(const LaunchShape& shape, const void* params, void* stream) const;

 private:
  friend const Kernel& kernel(int, const std::string&, const char*, int,
                              const std::function<std::shared_ptr<const std::string>()>&);
  void* handle_ = nullptr;
};

/// The kernel of this name on a device, loaded at the first call from `entry_point` of the cubin that `load` gives. The
/// reference stays valid; the device's context is current. `smem_bytes`: the most that a launch will ask for.
const Kernel& kernel(int ordinal, const std::string& name, const char* entry_point, int smem_bytes,
                     const std::function<std::shared_ptr<const std::string>()>& load);

/// A matrix seen by TMA: rows of `cols` elements, `row_stride_bytes` apart, copied in boxes. Operands (E4M3, BF16) lie
/// in shared memory with the 128-byte swizzle, scales (FP32) as they are.
struct TensorMapSpec {
  DType dtype;  ///< e4m3, bf16 or f32
  const void* data;
  std::int64_t rows, cols, row_stride_bytes;
  int box_rows, box_cols;
  bool read_once = false;  ///< L2 fetches lines of 128 bytes, not pairs of them

  friend bool operator==(const TensorMapSpec&, const TensorMapSpec&) = default;
};
/// Remembers the last ones of each thread: a model's layers come again and again.
TensorMap make_tensor_map(const TensorMapSpec& spec);

}  // namespace phalanx::cuda
