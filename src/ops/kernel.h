// What every operation needs to run on CUDA: a loaded kernel.
#pragma once

#include <atomic>

#include "cuda/cuda.h"
#include "jit/jit.h"

namespace phalanx {

/// SMs that a caller's `num_sms` leaves: all if it is 0.
int usable_sms(const cuda::DeviceInfo& device, int num_sms);

/// The kernel made from `source`, compiled or fetched from a cache at the first call. The device's context is current.
const cuda::Kernel& load_kernel(int ordinal, const jit::KernelSource& source, int smem_bytes);

/// The kernel of each device, found without building strings when warm. Two threads may both fill an entry, with the
/// same pointer.
class KernelOfDevice {
 public:
  template <class Source>
  const cuda::Kernel& get(int ordinal, const Source& source, int smem_bytes = 0) {
    const cuda::Kernel* kernel = kernels_[ordinal];
    if (!kernel) kernels_[ordinal] = kernel = &load_kernel(ordinal, source(), smem_bytes);
    return *kernel;
  }

 private:
  std::atomic<const cuda::Kernel*> kernels_[cuda::kMaxDevices];
};

}  // namespace phalanx
