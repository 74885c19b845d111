// What the rungs share. This text and problem.h stand before each of them.
#pragma once
#include "device/ptx/convert.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/sync.cuh"
#include "device/ptx/tma.cuh"
#include "device/ptx/wgmma.cuh"

namespace ladder {

using namespace phalanx;

constexpr int kBlock = 128;                   // rows and columns of a tile of D, and depth of a k-block
constexpr int kBlockBytes = kBlock * kBlock;  // of A or B, one byte an element
constexpr int kScaleBytes = kBlock * 4;       // of a k-block's scales of A
using Wgmma = ptx::WgmmaE4m3<kBlock>;         // 64 x 128 x 128 by one warpgroup
using Accumulator = float[kBlock / 2];        // a thread's share of its warpgroup's 64 x 128 of D

struct Tile {
  int m, n;  // its first row and column
};

// Tiles go down a column of D before the next: CTAs that run together share columns of B.
__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
  const int tiles_m = p.m / kBlock;
  return {index % tiles_m * kBlock, index / tiles_m * kBlock};
}

__device__ __forceinline__ int num_tiles(const Problem& p) { return (p.m / kBlock) * (p.n / kBlock); }

// The same in all threads of a warp, and the compiler knows.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xffffffff, threadIdx.x / 128, 0); }

__device__ __forceinline__ void clear(Accumulator& acc) {
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) acc[i] = 0;
}

// In a warpgroup's 64 rows a thread holds, of each 8 columns, two neighbours of row `fragment_row()` and two of the row
// 8 below.
__device__ __forceinline__ int fragment_row() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

__device__ __forceinline__ void store(const Problem& p, int row0, int col0, const Accumulator& acc) {
  float* d = p.d + i64(row0 + fragment_row()) * p.n + col0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kBlock / 8; ++i) {
    *reinterpret_cast<float2*>(d + i * 8) = make_float2(acc[i * 4], acc[i * 4 + 1]);
    *reinterpret_cast<float2*>(d + 8 * i64(p.n) + i * 8) = make_float2(acc[i * 4 + 2], acc[i * 4 + 3]);
  }
}

// Both operands of a k-block, by one thread. The barrier completes when all bytes have landed, those too that the
// caller requests besides.
__device__ __forceinline__ void request(const Problem& p, const Tile& t, int kb, u8* a, u8* b, u64* full,
                                        int more_bytes = 0) {
  ptx::mbarrier_arrive_expect_tx(full, 2 * kBlockBytes + more_bytes);
  ptx::tma_load_2d(a, &p.a, full, kb * kBlock, t.m);
  ptx::tma_load_2d(b, &p.b, full, kb * kBlock, t.n);
}

// A ring of stages between one producer thread and the consumer warps. A walker goes round it; `phase` is the parity of
// its laps, by which it tells a barrier's this completion from the one before.
template <int kStages>
struct Ring {
  static constexpr int kStageBytes = 2 * kBlockBytes + kScaleBytes;
  u8* smem;
  int stage = 0;
  u32 phase = 0;

  __device__ u8* a() const { return smem + stage * 2 * kBlockBytes; }
  __device__ u8* b() const { return a() + kBlockBytes; }
  __device__ float* sfa() const { return reinterpret_cast<float*>(smem + kStages * 2 * kBlockBytes) + stage * kBlock; }
  __device__ u64* full() const { return barriers() + stage; }             // published by TMA: the stage holds a k-block
  __device__ u64* empty() const { return barriers() + kStages + stage; }  // by consumers: it may be refilled
  __device__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ void wait_full() const { ptx::mbarrier_wait(full(), phase); }
  __device__ void wait_empty() const { ptx::mbarrier_wait(empty(), phase ^ 1); }  // the first lap passes at once

  // By one thread, before anyone else looks. `num_consumers` arrivals make a stage empty.
  __device__ void init(int num_consumers) const {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(barriers() + s, 1);
      ptx::mbarrier_init(barriers() + kStages + s, num_consumers);
    }
    ptx::fence_mbarrier_init();
  }

 private:
  __device__ u64* barriers() const { return reinterpret_cast<u64*>(smem + kStages * kStageBytes); }
};

// acc += sfa * sfb * partial: `scales` are those of the thread's two rows, times that of B's block.
__device__ __forceinline__ void promote(Accumulator& acc, const Accumulator& partial, float2 scales) {
#pragma unroll
  for (int i = 0; i < kBlock / 2; i += 4) {
    acc[i + 0] += scales.x * partial[i + 0];
    acc[i + 1] += scales.x * partial[i + 1];
    acc[i + 2] += scales.y * partial[i + 2];
    acc[i + 3] += scales.y * partial[i + 3];
  }
}

// As `request`, with the scales of A: they come by a bulk copy, which needs no tensor map.
template <int kStages>
__device__ __forceinline__ void request_scaled(const Problem& p, const Tile& t, int kb, const Ring<kStages>& ring) {
  request(p, t, kb, ring.a(), ring.b(), ring.full(), kScaleBytes);
  ptx::bulk_load(ring.sfa(), p.sfa + i64(kb) * p.m + t.m, kScaleBytes, ring.full());
}

// The scales of B for a tile, one a k-block.
__device__ __forceinline__ const float* scales_b(const Problem& p, const Tile& t) {
  return p.sfb + i64(t.n / kBlock) * (p.k / kBlock);
}

}  // namespace ladder
