// D[m, n] (+)= sum over k-blocks of  sfa[m, kb] * sfb[n, kb] * (A[m, kb] · B[n, kb]):  the gradient of a weight, K
// being tokens; or of many, D[g], each from its own columns of A and B.
//
// The roles and the ring of stages are those of gemm_fp8.cuh. What differs is the consumers' side:
//   - B has a scale per row, as A has: the tensor cores multiply them with each other (scale_products.cuh);
//   - a group of columns begins and ends anywhere. TMA reads whole k-blocks, and where one reaches into a neighbour's
//     columns, the consumers overwrite those with zeros before they multiply;
//   - one CTA sums a tile of a group from its first column to its last: no sum is shared, whatever the groups' sizes.
#pragma once
#include "device/gemm/gemm_fp8.cuh"
#include "device/gemm/scale_products.cuh"

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

// Sums the tile over `ks`, at least one k-block:
//
//     tensor cores   | sfa * sfb, product s |            | sfa * sfb, product s + 1
//     this warp      | is s + 1 there?      | += of s    | is s + 2 there?
//
// A register file has two banks, of even and of odd registers, and an instruction that reads three of one takes twice
// as long. Sum, scale and product of a value would be such three, as each begins at an even one; so neighbouring
// columns' scales change places.
template <GemmConfig C>
__device__ __forceinline__ void sum_columns(Consumer<C>& self, const Tile& t, const KRange& ks, u64 parts_a,
                                            u64 parts_b, PacedGradientStore<C>& gradient) {
  static_assert(C.num_waves() == 1);
  using Wgmma = typename Consumer<C>::Wgmma;
  constexpr int kValues = C.block_n / 2;
  int kb = ks.begin;
  const auto wait = [](const auto& pipe) {
    pipe.wait_full();
    ptx::fence_proxy_async();  // WGMMA reads what plain stores have written
  };
  const auto clear_others = [&] {
    const int stage = self.pipe.stage;
    clear_neighbours<C>(self.smem.a(stage), self.smem.b(stage), t.group_begin - kb * kBlockK,
                        t.group_end - kb * kBlockK);
  };
  // A k-block that is the group's in part is its first or its last; past K, TMA has put zeros. Which, is known before
  // the loop: what stands between a promotion and the next product is lost to the tensor cores.
  const bool last_ends_early = t.group_end < ks.end * kBlockK && t.group_end < self.p.k;
  const int shared_kb = last_ends_early ? ks.end - 1 : -1;

  wait(self.pipe);
  if (t.group_begin > kb * kBlockK || kb == shared_kb) clear_others();
  bool more = true;
  gradient.schedule(kb + 1);
#pragma unroll 1
  while (more) {
    const int stage = self.pipe.stage;
    float partial[kValues], scales[kValues];
    ptx::WgmmaTf32<C.block_n>::multiply(scales, ptx::wgmma_advance_first(parts_a, stage * C.parts_pitch()),
                                        ptx::wgmma_advance_first(parts_b, stage * C.parts_pitch()), false);
    Wgmma::multiply(partial, ptx::wgmma_advance(self.first_a, stage * C.block_m * kBlockK),
                    ptx::wgmma_advance(self.first_b, stage * C.block_n * kBlockK), false);
    auto next = self.pipe;
    next.advance();
    more = ++kb < ks.end;
    gradient.send_due(self.p, kb);
    if (more) wait(next);
    ptx::wgmma_wait<0>();
    self.release_stage();
    Wgmma::pin(scales);  // after the release: no sum goes before it
    Wgmma::pin(partial);
#pragma unroll
    for (int i = 0; i < kValues; ++i) self.acc[0][i] += scales[i ^ 1] * partial[i];
    self.pipe = next;
    if (kb == shared_kb) clear_others();
  }
}

template <GemmConfig C>
__device__ __forceinline__ void wgrad_fp8(const GemmParams& p) {
  static_assert(C.grouping == Grouping::columns && C.out == OutType::f32 && C.split_k == 1);
  const auto produce = [&](const SharedMemory<C>& smem, int warp, const Begin<C>& begin) {
    if (warp == 0) load_operands<C>(p, smem, begin);
    if (warp == 1) split_scales<C, false>(p, smem);
    if (warp == 3) split_scales<C, true>(p, smem);
  };
  run_roles<C>(p, produce, [&](const SharedMemory<C>& smem, int consumer, const Begin<C>&) {
    Consumer<C> self(p, smem, consumer);
    const int first_row = consumer * C.consumer_rows();
    // Else the compiler makes them anew for every k-block, before the product.
    const u64 parts_a = ptx::wgmma_keep(
                  ptx::wgmma_descriptor_halves(smem.parts_a(0) + first_row * kScalePartsBytes, smem.zeros())),
              parts_b = ptx::wgmma_keep(ptx::wgmma_descriptor_halves(smem.parts_b(0), smem.zeros()));
    auto tiles = my_tiles<C>(p, smem);
    PacedGradientStore<C> gradient{smem.gradient(consumer)};
    for (Tile t; tiles.next(t);) {
      const KRange ks = k_range(t);
      if (ks.begin == ks.end && p.c_ptr != nullptr) continue;  // nothing to add
      self.clear();
      if (ks.begin < ks.end) sum_columns<C>(self, t, ks, parts_a, parts_b, gradient);
      gradient.store(p, output_tile<C>(p, t), self.acc);
    }
    gradient.flush(p);
  });
}

}  // namespace phalanx
