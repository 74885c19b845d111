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

// Scales of a k-block that a thread needs: of its two rows, and of two in every 8 columns.
template <GemmConfig C>
struct ColumnScales {
  float a[2];
  float2 b[C.block_n / 8];

  __device__ __forceinline__ void load(const float* rows, const float* columns) {
    a[0] = rows[0], a[1] = rows[8];
#pragma unroll
    for (int i = 0; i < C.block_n / 8; ++i) b[i] = reinterpret_cast<const float2*>(columns)[i * 4];
  }
  // Of the thread's i-th value.
  __device__ __forceinline__ float product(int i) const { return a[i / 2 % 2] * (i % 2 ? b[i / 4].y : b[i / 4].x); }
};

// Sums the tile over `ks`, at least one k-block. While the tensor cores read shared memory, other reads of it wait long; so a
// k-block's scales are loaded between two products, and multiplied with each other under their own:
//
//     tensor cores   | product s              |                          | product s + 1
//     this warp      | sfa * sfb of s; full?  | += of s; scales of s + 1 | sfa * sfb of s + 1; full?
template <GemmConfig C>
__device__ __forceinline__ void sum_columns(Consumer<C>& self, const Tile& t, const KRange& ks) {
  static_assert(C.num_waves() == 1);
  using Wgmma = typename Consumer<C>::Wgmma;
  constexpr int kValues = C.block_n / 2;
  int column = threadIdx.x % 4 * 2, kb = ks.begin;
  ptx::keep_in_register(column);
  ColumnScales<C> scales;
  const auto load_scales = [&](int stage) {
    scales.load(self.smem.sfa(stage) + self.first_row, self.smem.sfb(stage) + column);
  };
  const auto clear_others = [&] {
    const int stage = self.pipe.stage, begin = t.group_begin - kb * kBlockK, end = t.group_end - kb * kBlockK;
    if (begin > 0 || (end < kBlockK && t.group_end < self.p.k))  // past K, TMA has put zeros
      clear_neighbours<C>(self.smem.a(stage), self.smem.b(stage), begin, end);
  };

  self.pipe.wait_full();
  load_scales(self.pipe.stage);
  clear_others();
  bool more = true;
#pragma unroll 1
  while (more) {
    const int stage = self.pipe.stage;
    float partial[kValues], products[kValues];
    Wgmma::multiply(partial, ptx::wgmma_advance(self.first_a, stage * C.block_m * kBlockK),
                    ptx::wgmma_advance(self.first_b, stage * C.block_n * kBlockK), false);
#pragma unroll
    for (int i = 0; i < kValues; ++i) products[i] = scales.product(i);
    Wgmma::pin(products);
    auto next = self.pipe;
    next.advance();
    more = ++kb < ks.end;
    if (more) next.wait_full();  // here also because ptxas moves no multiplication across its loop, down to the sums
    ptx::wgmma_wait<0>();
    Wgmma::pin(partial);
#pragma unroll
    for (int i = 0; i < kValues; ++i) self.acc[0][i] += products[i] * partial[i];
    load_scales(more ? next.stage : stage);  // no branch: they are to run among the sums
    __syncwarp();                            // every lane has read its scales
    self.release_stage();
    self.pipe = next;
    if (more) clear_others();
  }
}

template <GemmConfig C>
__device__ __forceinline__ void wgrad_fp8(const GemmParams& p) {
  static_assert(C.grouping == Grouping::columns && C.out == OutType::f32 && C.split_k == 1);
  run_fp8_roles<C>(p, [&](const SharedMemory<C>& smem, int consumer, const Begin<C>&) {
    Consumer<C> self(p, smem, consumer);
    auto tiles = my_tiles<C>(p, smem);
    for (Tile t; tiles.next(t);) {
      const KRange ks = k_range(t);
      if (ks.begin == ks.end && p.c_ptr != nullptr) continue;  // nothing to add
      self.clear();
      if (ks.begin < ks.end) sum_columns<C>(self, t, ks);
      smem.gradient().store(p, output_tile<C>(p, t), consumer, self.acc);
    }
    ptx::tma_store_wait_read();
  });
}

}  // namespace phalanx
