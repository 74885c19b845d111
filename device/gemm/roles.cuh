// What all kernels of products share: the shared memory of a CTA, its tiles, and its warps' roles.
//
//     warpgroups 0 .. num_consumers - 1    multiply
//     the last one, by warps               0 finds tiles and loads operands, 1 copies scales that TMA cannot read; of
//                                          gradients 1 and 3 split scales
//
// A warp that has nothing to do ends: one more that only sleeps costs the tensor cores 4 to 5 % of their cycles.
#pragma once
#include "device/gemm/gradient.cuh"
#include "device/gemm/group_table.cuh"
#include "device/gemm/grouped_tiles.h"
#include "device/gemm/pipeline.cuh"
#include "device/gemm/tile_ring.cuh"

namespace phalanx {

template <GemmConfig C>
struct SharedMemory {
  static constexpr SmemLayout kLayout = smem_layout(C);
  u8* base;

  __device__ u8* a(int stage) const { return base + kLayout.a + stage * C.block_m * kBlockK; }
  __device__ u8* b(int stage) const { return base + kLayout.b + stage * C.block_n * kBlockK; }
  __device__ float* partial() const { return reinterpret_cast<float*>(base + kLayout.d); }
  __device__ GradientPanels<C> gradient(int consumer) const { return {base + kLayout.d, consumer}; }
  __device__ u64* c_full() const { return reinterpret_cast<u64*>(base + kLayout.c_full); }
  __device__ StagedTile<C> staged() const { return {base + kLayout.d, c_full()}; }
  __device__ float* sfa(int stage) const {
    return reinterpret_cast<float*>(base + kLayout.sfa) + stage * C.scales_a_pitch();
  }
  __device__ float* sfb(int stage) const { return reinterpret_cast<float*>(base + kLayout.sfb) + stage * C.block_n; }
  // Scales in parts: of A's rows, and of B's behind them. The other halves of all these rows.
  __device__ u8* parts_a(int stage) const { return base + kLayout.parts + stage * C.parts_pitch(); }
  __device__ u8* parts_b(int stage) const { return parts_a(stage) + C.block_m * kScalePartsBytes; }
  __device__ u8* zeros() const { return base + kLayout.zeros; }
  // The stages once more, whose scales TMA has brought, but which are not in parts yet.
  __device__ Pipeline<C.num_stages> whole_scales() const {
    return {reinterpret_cast<u64*>(base + kLayout.scales_full), nullptr};
  }
  __device__ GroupEntry* groups() const { return reinterpret_cast<GroupEntry*>(base + kLayout.groups); }
  __device__ TileRing tiles() const {
    return {reinterpret_cast<TileRing::Slot*>(base + kLayout.tiles), reinterpret_cast<u64*>(base + kLayout.tile_full),
            reinterpret_cast<u64*>(base + kLayout.tile_empty)};
  }
  __device__ u64* sfa_empty() const { return reinterpret_cast<u64*>(base + kLayout.sfa_empty); }
  __device__ Pipeline<C.num_stages> pipeline() const {
    return {reinterpret_cast<u64*>(base + kLayout.full), reinterpret_cast<u64*>(base + kLayout.empty)};
  }
  // Few rows: A's part of the same stages, which has barriers of its own to be full.
  __device__ Pipeline<C.num_stages> activations() const {
    return {reinterpret_cast<u64*>(base + kLayout.a_full), reinterpret_cast<u64*>(base + kLayout.empty)};
  }
  __device__ float* maxima() const { return reinterpret_cast<float*>(base + kLayout.maxima); }
  __device__ u64* maxima_full() const { return reinterpret_cast<u64*>(base + kLayout.maxima_full); }
  __device__ u64* begun() const { return reinterpret_cast<u64*>(base + kLayout.begun); }
};

// Which part of K this CTA sums for a tile.
template <GemmConfig C>
__device__ KRange my_k_range(const GemmParams& p, const Tile& t) {
  if constexpr (C.grouping == Grouping::columns) return k_range(t);
  return k_range(p.k, C.split_k, C.split_k > 1 ? int(ptx::cluster_ctarank()) : 0, C.block_k());
}

// The tiles of this CTA, for one of its warps; where groups are, for those that do not find them.
template <GemmConfig C>
__device__ auto my_tiles(const GemmParams& p, const SharedMemory<C>& smem) {
  // A constant of its own: of the template's argument, NVRTC 13.2 loads the fields from memory, and divides by them.
  constexpr GemmConfig config = C;
  if constexpr (C.grouped())
    return TilesOfWarp{smem.tiles()};
  else
    return DenseTiles(config, p.m, p.n, p.group_m, blockIdx.x, gridDim.x);
}

// A guess before it is known which groups have rows: that each has one tile along M. Its first weights then come from
// L2. For nothing where groups are empty, and then others wait for memory meanwhile.
template <GemmConfig C>
__device__ void prefetch_weights(const GemmParams& p) {
  const int tiles_n = ceil_div(p.n, C.block_n), group = blockIdx.x / tiles_n;
  if (group >= p.groups.num_groups || !p.groups.one_tile_each) return;
  const int row = group * p.groups.b_pitch + blockIdx.x % tiles_n * C.rows_of_request_b();
#pragma unroll 1
  for (int kb = 0; kb < min_of(ceil_div(p.k, kBlockK), C.num_stages); ++kb)
#pragma unroll
    for (int half = 0; half <= C.gates_and_ups(); ++half) {
      if (p.streams_b)
        ptx::tma_prefetch_2d_once(&p.b, kb * kBlockK, row + half * (p.n / 2));
      else
        ptx::tma_prefetch_2d(&p.b, kb * kBlockK, row + half * (p.n / 2));
    }
}

// --- roles ----------------------------------------------------------------------------------------------------------

// A role finds its first tile before it calls this, once a thread, whole warps; from then on barriers are there, and
// memory may be read and written. A launch takes 2 to 3 us where there is little to do, and 0.5 of them went to
// scheduling behind the barrier. Where groups are, all that has happened before the roles begin.
template <GemmConfig C>
struct Begin {
  __device__ __forceinline__ void operator()() const {
    if constexpr (C.grouped()) return;
    if constexpr (C.multicasts())
      ptx::cluster_wait();
    else
      ptx::barrier_sync(0, C.num_threads());
    // After it we read what the previous kernel wrote, and overwrite what it read.
    ptx::grid_wait_dependencies();
  }
};

// The tiles of this CTA, found by one warp. Of groups, when load_spans has filled the table.
template <GemmConfig C>
__device__ __forceinline__ auto find_tiles(const GemmParams& p, const SharedMemory<C>& smem) {
  if constexpr (!C.grouped()) {
    return my_tiles<C>(p, smem);
  } else {
    constexpr GemmConfig config = C;  // see my_tiles
    constexpr bool kRows = C.grouping == Grouping::rows;
    GroupEntry* table = smem.groups();
    const int num_tiles =
        index_groups(p.groups, table, kRows ? C.block_m * C.cluster_m : 0, ceil_div(p.n, C.block_n * C.cluster_n));
    __syncwarp();
    if constexpr (kRows)
      return GroupedTiles(config, table, num_tiles, p.n, p.group_m, blockIdx.x, gridDim.x);
    else
      return ColumnGroupTiles(config, table, p.groups.num_groups, p.m, p.n, p.group_m, blockIdx.x, gridDim.x);
  }
}

// What one thread of a warp loads: load(t, pipe) for each tile of this CTA. By the warp.
template <GemmConfig C, class Load>
__device__ __forceinline__ void load_tiles(const GemmParams& p, const SharedMemory<C>& smem, const Begin<C>& begin,
                                           const Load& load) {
  auto pipe = smem.pipeline();
  auto tiles = find_tiles<C>(p, smem);
  Tile t;
  bool more = tiles.next(t);
  begin();
  if (!ptx::elect_one()) return;
  if constexpr (C.grouped()) {
    // The others hear of a tile before the one ahead of it is loaded: they look at it under their first product.
    TileRing ring = smem.tiles();
    const auto tell = [&](const Tile& tile) { ring.put(more ? tile : Tile{.m = 0, .n = 0, .group = -1}); };
    tell(t);
    for (Tile next; more; t = next) {
      more = tiles.next(next);
      tell(next);
      load(t, pipe);
    }
  } else {
    for (; more; more = tiles.next(t)) load(t, pipe);
  }
  if constexpr (C.multicasts())  // stay until the peers' last arrivals at our barriers have landed
    for (int i = 0; i < C.num_stages; ++i, pipe.advance()) pipe.wait_empty();
}

// Whether a warp copies A's scales into the stages.
template <GemmConfig C>
__device__ __forceinline__ bool copies_scales(const GemmParams& p) {
  return C.scaled() && !C.scales_b_by_row() && !p.sfa_by_tma;
}

// One thread.
template <GemmConfig C>
__device__ __forceinline__ void init_barriers(const GemmParams& p, const SharedMemory<C>& smem) {
  const auto pipe = smem.pipeline();
  const int scale_warps = C.scales_b_by_row() ? 2 : copies_scales<C>(p);
  for (int s = 0; s < C.num_stages; ++s) {
    ptx::mbarrier_init(&pipe.full[s], 1 + 32 * scale_warps);  // the producer, and lanes
    ptx::mbarrier_init(&pipe.empty[s],
                       C.cluster_n * C.cluster_m * C.num_consumers * 4);  // one arrival a consumer warp
  }
  if constexpr (C.scales_b_by_row())
    for (int s = 0; s < C.num_stages; ++s) ptx::mbarrier_init(&smem.whole_scales().full[s], 1);
  if (copies_scales<C>(p))
    for (int s = 0; s < C.num_stages; ++s) ptx::mbarrier_init(&smem.sfa_empty()[s], C.num_consumers * kWarpgroup);
  if constexpr (C.stores_by_tma())
    for (int i = 0; i < C.num_consumers; ++i) ptx::mbarrier_init(&smem.staged().c_full[i], 1);
  if constexpr (C.gates_and_ups())
    for (int i = 0; i < 4 * C.num_consumers; ++i) ptx::mbarrier_init(&smem.maxima_full()[i], 1);
  if constexpr (C.grouped()) {
    const TileRing tiles = smem.tiles();
#pragma unroll 1
    for (int s = 0; s < kTileSlots; ++s) {
      ptx::mbarrier_init(&tiles.full[s], 1);
      ptx::mbarrier_init(&tiles.empty[s], C.num_consumers * 4 + scale_warps);
    }
  }
  ptx::fence_mbarrier_init();
}

// `produce(smem, warp, begin)` is what a warp of the producer does, `consume(smem, consumer, begin)` what a consumer
// warpgroup does.
template <GemmConfig C, class Produce, class Consume>
__device__ __forceinline__ void run_roles(const GemmParams& p, const Produce& produce, const Consume& consume) {
  static_assert(is_valid(C));
  constexpr int kProducer = C.num_consumers;

  extern __shared__ __align__(1024) u8 smem_base[];
  const SharedMemory<C> smem{smem_base};
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);  // tells the compiler that a warp agrees
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);

  if (!p.leaves_sms) ptx::grid_launch_dependents();
  if (threadIdx.x == C.num_threads() - 32) {  // of a warp that has nothing else to do meanwhile
    if constexpr (C.grouping == Grouping::rows && C.scaled() && C.may_read_b_once()) prefetch_weights<C>(p);
    init_barriers<C>(p, smem);
  }
  if (threadIdx.x == kProducer * kWarpgroup) {
    ptx::prefetch_tensor_map(&p.a);
    if constexpr (C.scaled() && (C.grouping == Grouping::none || C.slices_last_rows()))
      ptx::prefetch_tensor_map(&p.a_last);
    if (C.scaled() && p.sfa_by_tma) ptx::prefetch_tensor_map(&p.sfa_map);
    ptx::prefetch_tensor_map(&p.b);
    if constexpr (C.stores_by_tma()) ptx::prefetch_tensor_map(&p.d);
  }
  if constexpr (C.grouped()) {
    ptx::grid_wait_dependencies();
    load_spans(p.groups, smem.groups());  // ends with a barrier of the CTA
    if constexpr (C.cluster_size() > 1) ptx::cluster_sync();
  } else if constexpr (C.multicasts()) {
    __syncwarp();
    ptx::cluster_arrive();
  }
  __syncwarp();

  const Begin<C> begin;
  if (warpgroup == kProducer) {
    if constexpr (C.num_consumers > 1) ptx::register_decrease<C.producer_registers()>();
    produce(smem, warp, begin);
  } else {
    if constexpr (C.num_consumers > 1) ptx::register_increase<C.consumer_registers()>();
    consume(smem, warpgroup, begin);
  }

  if constexpr (C.split_k > 1) {  // the grid is one cluster per tile
    __syncwarp();
    ptx::cluster_sync();  // publishes every partial tile
    Tile t;
    my_tiles<C>(p, smem).next(t);
    SplitKReduction<C>{smem.partial()}.sum_and_store(p, t, ptx::cluster_ctarank());
    ptx::cluster_sync();  // our shared memory lives until the peers have read it
  }
}

}  // namespace phalanx
