// Products are done when they are waited for: the latest time that is allowed.
#pragma once
#include "device/ptx/tma.cuh"
#include "device/ptx/wgmma_descriptor.cuh"
#include "device/ptx/wgmma_e4m3.cuh"

namespace phalanx::ptx {

template <int kPending>
void wgmma_wait() {
  for (auto& products = simt::fiber().products; int(products.size()) > kPending; products.pop_front())
    products.front()();
  __syncwarp();  // a warp waits together: who then releases a stage does it for all lanes
}

}  // namespace phalanx::ptx
