// The links' ceilings: kernels that store to, or load from, another GPU's memory, or wait for it, and do nothing else.
#pragma once
#include "device/ptx/system.cuh"

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

// Two GPUs, a thread each: a flag goes there and back, `rounds` times. Gives up after a while. The nanoseconds of it
// all.
__device__ __forceinline__ void flag_round_trips(u64* mine, u64* theirs, bool first, u64 rounds, u64* nanoseconds) {
  constexpr int kPatience = 10'000'000;
  const u64 start = ptx::global_timer();
  for (u64 round = 1; round <= rounds; ++round) {
    if (first) ptx::store_relaxed_sys(theirs, round);
    for (int turn = 0; turn < kPatience && ptx::load_acquire_sys(mine) < round; ++turn) {
    }
    if (!first) ptx::store_relaxed_sys(theirs, round);
  }
  *nanoseconds = ptx::global_timer() - start;
}

}  // namespace phalanx::probe
