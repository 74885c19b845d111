// Reading one row with many pieces on their way: cp.async into shared memory that is the thread's own, so that no
// barrier is needed.
#pragma once
#include "device/ep/layout.h"
#include "device/ptx/memory.cuh"

namespace phalanx {

struct alignas(16) EpVector {
  u32 word[4];
};

constexpr int kEpPitch = 32 * 16;  // bytes of a warp's pieces, from one of a thread's pieces to its next

// The ring of this thread in `rings`, those of a CTA with `depth` pieces a thread.
__device__ __forceinline__ u8* ep_ring(u8* rings, int depth) {
  return rings + threadIdx.x / 32 * (depth * kEpPitch) + threadIdx.x % 32 * 16;
}

// Calls consume(offset, inside, piece) for the pieces of [begin, end) that are this lane's; `inside` is false behind
// the end.
// All lanes take part.
template <int kDepth, class Consume>
__device__ __forceinline__ void ep_stream(const u8* from, i64 begin, i64 end, u8* ring, const Consume& consume) {
  const i64 lane_offset = threadIdx.x % 32 * 16;
  i64 ahead = begin + lane_offset;
  int ahead_slot = 0, slot = 0;
  const auto fetch = [&] {
    if (ahead < end) ptx::cp_async_16(ring + ahead_slot * kEpPitch, from + ahead);
    ptx::cp_async_commit_group();
    ahead += kEpPitch;
    ahead_slot = ahead_slot + 1 == kDepth ? 0 : ahead_slot + 1;
  };
  for (int i = 0; i < kDepth && begin + i * kEpPitch < end; ++i) fetch();
  for (i64 first = begin; first < end; first += kEpPitch) {
    // So many groups may be behind the one that is wanted; the last ones, fewer, are waited for together.
    if (first + kDepth * kEpPitch <= end)
      ptx::cp_async_wait_group<kDepth - 1>();
    else
      ptx::cp_async_wait_group<0>();
    const EpVector piece = *reinterpret_cast<const EpVector*>(ring + slot * kEpPitch);
    slot = slot + 1 == kDepth ? 0 : slot + 1;
    consume(first + lane_offset, first + lane_offset < end, piece);
    if (first + kDepth * kEpPitch < end) fetch();
  }
}

}  // namespace phalanx
