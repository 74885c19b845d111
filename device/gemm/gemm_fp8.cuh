// D[m, n] = sum over k-blocks of  sfa[m, kb] * sfb[n / 128, kb] * (A[m, kb] · B[n, kb])  (+ C[m, n])
//
// A, B: E4M3. A CTA is a ring of shared-memory stages, each one k-block (128 deep) of A, B and A's scales, between
//
//     producer warpgroup                                consumer warpgroups (each owns rows of the tile)
//       warp 0, one thread: A, B by TMA ----+             wait full[s]
//       warp 1: scales of A by cp.async ----+-> full[s]   64 x block_n x 128 by WGMMA, into `partial`
//       both wait empty[s]  <------------------ empty[s]  arrive: the stage may be refilled
//                                                         promote: acc += scale_a * scale_b * partial
//
// The tensor cores sum one k-block only, in their own narrower accumulator; the promotion in FP32 registers is what
// makes the scaling fine-grained and the long sum accurate (docs/numerics.md).
#pragma once
#include "device/gemm/epilogue.cuh"
#include "device/gemm/pipeline.cuh"
#include "device/ptx/wgmma.cuh"

namespace phalanx {

template <GemmConfig C>
struct SharedMemory {
  static constexpr SmemLayout kLayout = smem_layout(C);
  u8* base;

  __device__ u8* a(int stage) const { return base + kLayout.a + stage * C.block_m * kBlockK; }
  __device__ u8* b(int stage) const { return base + kLayout.b + stage * C.block_n * kBlockK; }
  __device__ float* partial() const { return reinterpret_cast<float*>(base + kLayout.d); }
  __device__ StagedTile<C> staged() const { return {base + kLayout.d, reinterpret_cast<u64*>(base + kLayout.c_full)}; }
  __device__ float* sfa(int stage) const { return reinterpret_cast<float*>(base + kLayout.sfa) + stage * C.block_m; }
  __device__ Pipeline<C.num_stages> pipeline() const {
    return {reinterpret_cast<u64*>(base + kLayout.full), reinterpret_cast<u64*>(base + kLayout.empty)};
  }
};

// Which part of K this CTA sums.
template <GemmConfig C>
__device__ KRange my_k_range(const GemmParams& p) {
  return k_range(p.k, C.split_k, C.split_k > 1 ? int(ptx::cluster_ctarank()) : 0);
}

template <GemmConfig C>
__device__ DenseTiles my_tiles(const GemmParams& p) {
  return DenseTiles(C, p.m, p.n, p.group_m, blockIdx.x, gridDim.x);
}

// --- producers ------------------------------------------------------------------------------------------------------

// One thread. Of a cluster that shares A, each CTA loads its slice of the rows into all.
template <GemmConfig C>
__device__ void load_operands(const GemmParams& p, const SharedMemory<C>& smem) {
  constexpr u32 kStageBytes = (C.block_m + C.block_n) * kBlockK;
  constexpr int kSliceRows = C.block_m / C.cluster_n;
  constexpr u16 kAllCtas = (1 << C.cluster_n) - 1;
  const int slice = C.cluster_n > 1 ? ptx::cluster_ctarank() * kSliceRows : 0;
  const KRange ks = my_k_range<C>(p);

  auto pipe = smem.pipeline();
  auto tiles = my_tiles<C>(p);
  for (Tile t; tiles.next(t);) {
#pragma unroll 1
    for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance()) {
      pipe.wait_empty();
      u64* full = &pipe.full[pipe.stage];
      u8* a = smem.a(pipe.stage) + slice * kBlockK;
      ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
      if constexpr (C.cluster_n > 1)
        ptx::tma_load_2d_multicast(a, &p.a, full, kb * kBlockK, t.m + slice, kAllCtas, ptx::kEvictNormal);
      else
        ptx::tma_load_2d(a, &p.a, full, kb * kBlockK, t.m, ptx::kEvictNormal);
      ptx::tma_load_2d(smem.b(pipe.stage), &p.b, full, kb * kBlockK, t.n, ptx::kEvictNormal);
    }
  }
  if constexpr (C.cluster_n > 1)  // stay until the peers' last arrivals at our barriers have landed
    for (int i = 0; i < C.num_stages; ++i, pipe.advance()) pipe.wait_empty();
}

// One warp. cp.async copies single floats, so the scales may have any strides.
template <GemmConfig C>
__device__ void load_scales(const GemmParams& p, const SharedMemory<C>& smem) {
  const int lane = threadIdx.x % 32;
  const KRange ks = my_k_range<C>(p);

  auto pipe = smem.pipeline();
  auto tiles = my_tiles<C>(p);
  for (Tile t; tiles.next(t);) {
    const float* block = p.sfa + ks.begin * p.sfa_stride_k + (t.m + lane) * p.sfa_stride_m;
    const int rows = p.m - t.m;  // rows past M keep what they hold: their results are not stored
#pragma unroll 1
    for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance(), block += p.sfa_stride_k) {
      pipe.wait_empty();
      const float* scale = block;
#pragma unroll 2
      for (int row = lane; row < C.block_m; row += 32, scale += 32 * p.sfa_stride_m)
        if (row < rows) ptx::cp_async_4(&smem.sfa(pipe.stage)[row], scale);
      ptx::mbarrier_arrive_cp_async(&pipe.full[pipe.stage]);
    }
  }
}

// --- consumers ------------------------------------------------------------------------------------------------------

template <GemmConfig C>
__device__ void accumulate_tile(const GemmParams& p, const SharedMemory<C>& smem, Pipeline<C.num_stages>& pipe,
                                const Tile& t, int consumer, Accumulator<C>& acc) {
  constexpr int kWgmmaK = 32;
  const int lane = threadIdx.x % 32;
  const KRange ks = my_k_range<C>(p);
  // A tile sees one column of B's scales; a tile past N, beside a ragged edge, must still read inside them.
  const float* sfb = p.sfb + min_of(t.n, p.n - 1) / kScaleBlock * p.sfb_stride_n + ks.begin * p.sfb_stride_k;

#pragma unroll
  for (auto& wave : acc)
#pragma unroll
    for (float& x : wave) x = 0;

  for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance(), sfb += p.sfb_stride_k) {
    const float scale_b = *sfb;  // arrives under the products. Not __ldg: the previous kernel may have written it
    pipe.wait_full();
    float scales_a[C.num_waves()][2];  // loaded now: the stage is given back before the last promotion
#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave) {
      const float* sfa = smem.sfa(pipe.stage) + fragment_row<C>(consumer, wave);
      scales_a[wave][0] = sfa[0], scales_a[wave][1] = sfa[8];
    }

#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave) {
      float partial[C.block_n / 2];
      const u64 desc_a =
          ptx::wgmma_descriptor(smem.a(pipe.stage) + (consumer * C.consumer_rows() + wave * 64) * kBlockK);
      const u64 desc_b = ptx::wgmma_descriptor(smem.b(pipe.stage));
      ptx::wgmma_fence_registers(partial);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockK; k += kWgmmaK)  // a descriptor counts in 16 bytes
        ptx::WgmmaE4m3<C.block_n>::issue(partial, desc_a + k / 16, desc_b + k / 16, k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_fence_registers(partial);

      if (wave == C.num_waves() - 1 && lane < C.cluster_n) {
        if constexpr (C.cluster_n > 1)
          ptx::mbarrier_arrive_cluster(&pipe.empty[pipe.stage], lane);
        else
          ptx::mbarrier_arrive(&pipe.empty[pipe.stage]);
      }

      const float scale_lo = scales_a[wave][0] * scale_b, scale_hi = scales_a[wave][1] * scale_b;
#pragma unroll
      for (int i = 0; i < C.block_n / 2; i += 4) {  // promote
        acc[wave][i + 0] += scale_lo * partial[i + 0];
        acc[wave][i + 1] += scale_lo * partial[i + 1];
        acc[wave][i + 2] += scale_hi * partial[i + 2];
        acc[wave][i + 3] += scale_hi * partial[i + 3];
      }
    }
  }
}

// A persistent CTA: one tile after the other, each stored while the producers already fetch the next.
template <GemmConfig C>
__device__ void consume_tiles(const GemmParams& p, const SharedMemory<C>& smem, int consumer) {
  auto pipe = smem.pipeline();
  auto tiles = my_tiles<C>(p);
  auto staged = smem.staged();
  for (Tile t; tiles.next(t);) {
    if constexpr (C.stores_by_tma())
      if (p.c_ptr != nullptr && threadIdx.x % kWarpgroup == 0) staged.load_c(p, t, consumer);
    Accumulator<C> acc;
    accumulate_tile<C>(p, smem, pipe, t, consumer, acc);
    if constexpr (C.stores_by_tma())
      staged.store(p, t, consumer, acc);
    else if constexpr (C.split_k == 1)
      store_tile_direct<C>(p, t, consumer, acc);
    else
      SplitKReduction<C>{smem.partial()}.publish(consumer, acc);
  }
  if constexpr (C.stores_by_tma()) ptx::tma_store_wait_all();
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <GemmConfig C>
__device__ __forceinline__ void gemm_fp8(const GemmParams& p) {
  static_assert(is_valid(C));
  constexpr int kProducer = C.num_consumers, kScaleWarpLanes = 32;

  extern __shared__ __align__(1024) u8 smem_base[];
  const SharedMemory<C> smem{smem_base};
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);  // tells the compiler that a warp agrees
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);

  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    const auto pipe = smem.pipeline();
    for (int s = 0; s < C.num_stages; ++s) {
      ptx::mbarrier_init(&pipe.full[s], 1 + kScaleWarpLanes);
      ptx::mbarrier_init(&pipe.empty[s], C.cluster_n * C.num_consumers * 4);  // one arrival per consumer warp
    }
    if constexpr (C.stores_by_tma())
      for (int i = 0; i < C.num_consumers; ++i) ptx::mbarrier_init(&smem.staged().c_full[i], 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensor_map(&p.a);
    ptx::prefetch_tensor_map(&p.b);
    if constexpr (C.stores_by_tma()) ptx::prefetch_tensor_map(&p.d);
  }
  if constexpr (C.cluster_size() > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
  ptx::grid_wait_dependencies();  // from here on we read what the previous kernel wrote, and overwrite what it read

  if (warpgroup == kProducer) {
    if constexpr (C.num_consumers == 2) ptx::register_decrease<40>();
    if (warp == 0 && ptx::elect_one()) load_operands<C>(p, smem);
    if (warp == 1) load_scales<C>(p, smem);
  } else {
    if constexpr (C.num_consumers == 2) ptx::register_increase<232>();
    consume_tiles<C>(p, smem, warpgroup);
  }

  if constexpr (C.split_k > 1) {  // the grid is one cluster per tile
    __syncwarp();
    ptx::cluster_sync();  // publishes every partial tile
    Tile t;
    my_tiles<C>(p).next(t);
    SplitKReduction<C>{smem.partial()}.sum_and_store(p, t, ptx::cluster_ctarank());
    ptx::cluster_sync();  // our shared memory lives until the peers have read it
  }
}

}  // namespace phalanx
