// Accumulators -> D in FP32, added to what is there or not: the way out of a weight's gradient.
//
//     registers -> 64 rows x 32 columns of shared memory -> TMA, which stores, or adds in L2 (and clips at D's columns)
//
// Each consumer warpgroup has two such panels, one leaving while the other is written, so that D is neither read by a
// thread nor waited for: it passes under the next tile's products. One CTA sums a tile, so nothing else adds to it.
#pragma once
#include "device/gemm/epilogue.cuh"

namespace phalanx {

template <GemmConfig C>
struct GradientStore {
  static constexpr int kPanels = C.block_n / kGradientColumns;  // of a wave
  u8* base;

  __device__ u8* panel(int consumer, int i) const { return base + (consumer * 2 + i % 2) * kGradientPanelBytes; }

  // Of a tile's panels, one a k-block: what is to be added to comes into L2 while the last k-blocks are multiplied. All
  // CTAs end their tiles at about the same time; the reads from memory would hold up the next tile's.
  __device__ static void prefetch(const GemmParams& p, int col, int row, int i) {
    constexpr int kWaves = C.num_consumers * C.num_waves();
    if (i < kPanels * kWaves) ptx::tma_prefetch_2d(&p.d, col + i % kPanels * kGradientColumns, row + i / kPanels * 64);
  }

  __device__ void store(const GemmParams& p, const Tile& t, int consumer, const Accumulator<C>& acc) const {
    const bool is_issuer = threadIdx.x % kWarpgroup == 0;
#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave) {
      const int row = t.m + consumer * C.consumer_rows() + wave * 64;
      const bool past_rows = row + 64 > t.group_end;  // TMA would write into the next group
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int col = t.n + i * kGradientColumns;
        u8* smem = panel(consumer, i);
        if (is_issuer) ptx::tma_store_wait_read_but<1>();
        ptx::named_barrier_sync(1 + consumer, kWarpgroup);  // the panel before the last has left
        write(smem, &acc[wave][i * (kGradientColumns / 2)]);
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(1 + consumer, kWarpgroup);
        if (past_rows || (p.n % 4 != 0 && col + kGradientColumns > p.n))  // TMA writes whole 16 bytes
          copy_out(p, smem, row, col, t.group_end);
        else if (is_issuer && p.c_ptr != nullptr)
          ptx::tma_reduce_add_2d(&p.d, smem, col, row);
        else if (is_issuer)
          ptx::tma_store_2d(&p.d, smem, col, row);
        if (is_issuer) ptx::tma_store_commit();
      }
    }
  }

  // This thread's 16 values: rows of 128 bytes, swizzled.
  __device__ static void write(u8* smem, const float* x) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    u8* at = smem + row * 128 + lane % 2 * 8;
#pragma unroll
    for (int j = 0; j < kGradientColumns / 8; ++j) {
      const int chunk = ((j * 2 + lane % 4 / 2) ^ (row % 8)) * 16;
      *reinterpret_cast<float2*>(at + chunk) = make_float2(x[j * 4], x[j * 4 + 1]);
      *reinterpret_cast<float2*>(at + chunk + 8 * 128) = make_float2(x[j * 4 + 2], x[j * 4 + 3]);
    }
  }

  // At D's edges: element by element.
  __device__ static void copy_out(const GemmParams& p, const u8* smem, int row, int col, int end_row) {
#pragma unroll 1
    for (int i = threadIdx.x % kWarpgroup; i < 64 * kGradientColumns; i += kWarpgroup) {
      const int r = i / kGradientColumns, c = i % kGradientColumns;
      if (row + r >= end_row || col + c >= p.n) continue;
      float* d = static_cast<float*>(p.d_ptr) + (row + r) * p.d_stride + col + c;
      const float x = *reinterpret_cast<const float*>(smem + r * 128 + ((c / 4) ^ (r % 8)) * 16 + c % 4 * 4);
      *d = p.c_ptr != nullptr ? *d + x : x;
    }
  }
};

}  // namespace phalanx
