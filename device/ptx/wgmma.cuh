// Warpgroup matrix multiply: ordering. Products are in wgmma_e4m3.cuh and its neighbours.
#pragma once
#include "device/ptx/wgmma_descriptor.cuh"
#include "device/ptx/wgmma_e4m3.cuh"

namespace phalanx::ptx {

// Until all but the last `kPending` commit groups of this warpgroup are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace phalanx::ptx
