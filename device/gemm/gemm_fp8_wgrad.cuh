// D[m, n] (+)= sum over k-blocks of  sfa[m, kb] * sfb[n, kb] * (A[m, kb] · B[n, kb]):  the gradient of a weight, K being tokens;
// or of many, D[g], each from its own columns of A and B.
//
// The roles and the ring of stages are those of gemm_fp8.cuh. What differs is the consumers' side:
//   - B has a scale per row, so a thread needs two for every 8 columns: TMA brings them with the stage, and the stage is
//     released when they have been used;
//   - a group of columns begins and ends anywhere. TMA reads whole k-blocks, and where one reaches into a neighbour's
//     columns, the consumers overwrite those with zeros before they multiply;
//   - one CTA sums a tile of a group from its first column to its last: no sum is shared, whatever the groups' sizes.
#pragma once
#include "device/gemm/gemm_fp8.cuh"

namespace phalanx {

// Bytes [begin, end) of each of `rows` swizzled 128-byte rows stay; the others become zeros. By `num_threads` threads.
__device__ inline void keep_columns(u8* tile, int rows, int begin, int end, int thread, int num_threads) {
#pragma unroll 1
  for (int i = thread; i < rows * 8; i += num_threads) {
    const int row = i / 8, first = i % 8 * 16;
    if (first >= begin && first + 16 <= end) continue;
    u8* chunk = tile + row * 128 + ((i % 8) ^ (row % 8)) * 16;
    if (first >= end || first + 16 <= begin)
      *reinterpret_cast<uint4*>(chunk) = make_uint4(0, 0, 0, 0);
    else
#pragma unroll 1
      for (int j = 0; j < 16; ++j)
        if (first + j < begin || first + j >= end) chunk[j] = 0;
  }
}

// The k-block in this stage belongs to the tile's group in part.
template <GemmConfig C>
__device__ __forceinline__ void clear_neighbours(u8* a, u8* b, int begin, int end) {
  constexpr int kThreads = C.num_consumers * kWarpgroup;
  keep_columns(a, C.block_m, begin, end, threadIdx.x, kThreads);
  keep_columns(b, C.block_n, begin, end, threadIdx.x, kThreads);
  ptx::fence_proxy_async();  // WGMMA reads what plain stores have written
  ptx::named_barrier_sync(1 + C.num_consumers, kThreads);
}

// A thread's products of scales for one wave; `scales_b` are those of the tile's columns, in shared memory.
template <GemmConfig C>
__device__ __forceinline__ void multiply_scales(float (&scales)[C.block_n / 2], const float (&scales_a)[2],
                                                const float* scales_b) {
  const float2* mine = reinterpret_cast<const float2*>(scales_b) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < C.block_n / 2; i += 4) {
    const float2 b = mine[i];
    scales[i + 0] = scales_a[0] * b.x, scales[i + 1] = scales_a[0] * b.y;
    scales[i + 2] = scales_a[1] * b.x, scales[i + 3] = scales_a[1] * b.y;
  }
}

// One k-block of the tile's group; the first begins the sum. Scales are multiplied under the product, where registers suffice
// for them.
template <GemmConfig C, bool kFirst>
__device__ __forceinline__ void multiply_columns(Consumer<C>& self, const Tile& t, int kb) {
  using Wgmma = typename Consumer<C>::Wgmma;
  constexpr bool kEarly = C.num_consumers < 3 && C.num_waves() == 1;
  const int stage = self.pipe.stage;
  self.pipe.wait_full();
  const int begin = t.group_begin - kb * kBlockK, end = t.group_end - kb * kBlockK;
  if (begin > 0 || (end < kBlockK && t.group_end < self.p.k))  // past K, TMA has put zeros
    clear_neighbours<C>(self.smem.a(stage), self.smem.b(stage), begin, end);
#pragma unroll
  for (int wave = 0; wave < C.num_waves(); ++wave) {
    float partial[C.block_n / 2], scales[C.block_n / 2];
    Wgmma::multiply(partial, ptx::wgmma_advance(self.first_a, (stage * C.block_m + wave * 64) * kBlockK),
                    ptx::wgmma_advance(self.first_b, stage * C.block_n * kBlockK), false);
    const float* sfa = self.smem.sfa(stage) + self.first_row + wave * 64;
    const float scales_a[2] = {sfa[0], sfa[8]};
    if constexpr (kEarly) {
      multiply_scales<C>(scales, scales_a, self.smem.sfb(stage));
      Wgmma::pin(scales);  // here, not after the wait
    }
    ptx::wgmma_wait<0>();
    Wgmma::pin(partial);
    if constexpr (!kEarly) multiply_scales<C>(scales, scales_a, self.smem.sfb(stage));
#pragma unroll
    for (int i = 0; i < C.block_n / 2; ++i)
      self.acc[wave][i] = kFirst ? scales[i] * partial[i] : self.acc[wave][i] + scales[i] * partial[i];
  }
  __syncwarp();  // every lane has read its scales
  self.release_stage();
  self.pipe.advance();
}

template <GemmConfig C>
__device__ __forceinline__ void wgrad_fp8(const GemmParams& p) {
  static_assert(C.grouping == Grouping::columns && C.out == OutType::f32 && C.split_k == 1);
  run_fp8_roles<C>(p, [&](const SharedMemory<C>& smem, int consumer) {
    Consumer<C> self(p, smem, consumer);
    auto tiles = my_tiles<C>(p, smem);
    for (Tile t; tiles.next(t);) {
      const KRange ks = k_range(t);
      if (ks.begin < ks.end) {
        multiply_columns<C, true>(self, t, ks.begin);
#pragma unroll 1
        for (int kb = ks.begin + 1; kb < ks.end; ++kb) multiply_columns<C, false>(self, t, kb);
      } else if (p.c_ptr == nullptr) {
        self.clear();
      } else {  // nothing to add
        continue;
      }
      smem.gradient().store(p, output_tile<C>(p, t), consumer, self.acc);
    }
    ptx::tma_store_wait_all();
  });
}

}  // namespace phalanx
