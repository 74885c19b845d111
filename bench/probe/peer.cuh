// The links' ceiling: a kernel that stores to, or loads from, another GPU's memory and does nothing else.
#pragma once
#include "device/types.h"

namespace phalanx::probe {

struct alignas(16) PeerWords {
  u32 x, y, z, w;
};

// Every thread keeps kDepth independent 16-byte accesses in flight. `from` or `to` is the peer's.
template <int kDepth>
__device__ __forceinline__ void peer_copy(const PeerWords* from, PeerWords* to, i64 count) {
  const i64 stride = i64(gridDim.x) * blockDim.x;
  for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += kDepth * stride) {
    PeerWords v[kDepth];
#pragma unroll
    for (int j = 0; j < kDepth; ++j)
      if (i + j * stride < count) v[j] = from[i + j * stride];
#pragma unroll
    for (int j = 0; j < kDepth; ++j)
      if (i + j * stride < count) to[i + j * stride] = v[j];
  }
}

}  // namespace phalanx::probe
