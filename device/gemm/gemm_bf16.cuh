// D[m, n] = A[m, :] · B[n, :] (+ C[m, n]), A and B in BF16; of many groups of rows, each with its own B; or of many
// groups of columns, each with its own D, to which the sum may be added.
//
// Roles and ring of stages are those of gemm_fp8.cuh. There are no scales and so no promotion: a tile is summed from
// its first k-block (64 deep) to its last in the accumulators, and the tensor cores always have the next product before
// one is done:
//
//     producer (one thread)                             consumer warpgroups (each owns rows of the tile)
//       wait empty[s]  <------------------------------    wait full[s]
//       A, B by TMA -------------------------> full[s]    64 x block_n x 64 by WGMMA, added to `acc`
//                                                         wait for the product before it
//                                              empty[s-1]  arrive: that stage may be refilled
//
// Either operand is K-major, as E4M3 is, or MN-major: panels of 64 rows, which lie in shared memory as 64 lines of 128
// bytes, one for each k. The tensor cores read both.
#pragma once
#include "device/gemm/origin.cuh"
#include "device/gemm/roles.cuh"
#include "device/ptx/wgmma.cuh"
#include "device/ptx/wgmma_bf16.cuh"

namespace phalanx {

constexpr int kLineBytes = 128;                        // of a stage: a row of 64 k, or a k of 64 rows
constexpr int kPanelBytes = kBf16BlockK * kLineBytes;  // of 64 rows, in either layout

// What a CTA sums for a tile: `count` k-blocks from column `begin` on. Columns from `end` on belong to others.
struct KPart {
  int begin, count, end;
};
template <GemmConfig C>
__device__ KPart k_part(const GemmParams& p, const Tile& t) {
  if constexpr (C.grouping == Grouping::columns) {
    return {t.group_begin, ceil_div(t.group_end - t.group_begin, kBf16BlockK), t.group_end};
  } else {
    const KRange blocks = my_k_range<C>(p, t);
    return {blocks.begin * kBf16BlockK, blocks.end - blocks.begin, p.k};
  }
}

// --- producer -------------------------------------------------------------------------------------------------------

// A k-block of `kRows` rows, of which each of the `kSharers` CTAs of a cluster that share them loads a slice into all.
template <Major kMajor, int kRows, int kSharers>
__device__ void load_operand(u8* smem, const TensorMap* map, u64* full, int row, int k) {
  constexpr int kSlice = kRows / kSharers;
  const int first = kSharers > 1 ? int(ptx::cluster_ctarank()) * kSlice : 0;
  const auto load = [&](int at, int x, int y) {
    if constexpr (kSharers > 1)
      ptx::tma_load_2d_multicast(smem + at * kLineBytes, map, full, x, y, (1 << kSharers) - 1);
    else
      ptx::tma_load_2d(smem + at * kLineBytes, map, full, x, y);
  };
  if constexpr (kMajor == Major::k) {
    load(first, k, row + first);
  } else {
#pragma unroll
    for (int i = first; i < first + kSlice; i += kPanelRows) load(i, row + i, k);
  }
}

// One warp, of which one thread loads.
template <GemmConfig C>
__device__ void load_bf16_operands(const GemmParams& p, const SharedMemory<C>& smem, const Begin<C>& begin) {
  const u32 stage_bytes = (p.rows_a + C.block_n) * kLineBytes;
  load_tiles<C>(p, smem, begin, [&](const Tile& t, auto& pipe) {
    const KPart part = k_part<C>(p, t);
    const TileOrigin at = origin_of<C>(p, t);
    // Groups lie one below the other in the tensor map of B, in its rows or, MN-major, in its k.
    const int row_b = C.major_b == Major::k ? at.b : t.n, k_b = at.b - row_b;
#pragma unroll 1
    for (int i = 0, k = part.begin; i < part.count; ++i, k += kBf16BlockK, pipe.advance()) {
      pipe.wait_empty();
      u64* full = &pipe.full[pipe.stage];
      ptx::mbarrier_arrive_expect_tx(full, stage_bytes);
      load_operand<C.major_a, C.block_m, C.cluster_n>(smem.a(pipe.stage), &p.a, full, at.a, k);
      load_operand<C.major_b, C.block_n, C.cluster_m>(smem.b(pipe.stage), &p.b, full, row_b, k_b + k);
    }
  });
}

// --- consumers ------------------------------------------------------------------------------------------------------

template <Major kMajor>
__device__ u64 bf16_descriptor(const u8* smem) {
  return kMajor == Major::k ? ptx::wgmma_descriptor(smem) : ptx::wgmma_descriptor_mn(smem, kPanelBytes);
}

// The k from `begin` on of an MN-major operand become zeros. By `num_threads` threads.
__device__ inline void clear_lines(u8* operand, int rows, int begin, int thread, int num_threads) {
#pragma unroll 1
  for (int panel = 0; panel < rows / kPanelRows; ++panel)
#pragma unroll 1
    for (int i = begin * kLineBytes + thread * 16; i < kPanelBytes; i += num_threads * 16)
      *reinterpret_cast<uint4*>(operand + panel * kPanelBytes + i) = make_uint4(0, 0, 0, 0);
}

// What a thread of a consumer warpgroup carries from one k-block to the next.
template <GemmConfig C>
struct Bf16Consumer {
  using Wgmma = ptx::WgmmaBf16<C.block_n, C.major_a == Major::mn, C.major_b == Major::mn>;
  // TMA clips at the ends of its matrix. Where groups follow each other along the k of an MN-major operand, the last
  // k-block of one reaches into the next, whose values may be anything.
  static constexpr bool kMeetsNeighbours = C.grouped() && (C.major_a == Major::mn || C.major_b == Major::mn);

  const SharedMemory<C>& smem;
  Pipeline<C.num_stages> pipe;
  int lane;
  u64 first_a, first_b;  // descriptors of its rows of A and of B in stage 0
  Accumulator<C> acc;

  __device__ Bf16Consumer(const SharedMemory<C>& smem_, int consumer)
      : smem(smem_),
        pipe(smem_.pipeline()),
        lane(threadIdx.x % 32),
        first_a(bf16_descriptor<C.major_a>(smem_.a(0) + consumer * C.consumer_rows() * kLineBytes)),
        first_b(bf16_descriptor<C.major_b>(smem_.b(0))) {}

  // `own` columns of this k-block are the tile's.
  __device__ __forceinline__ void begin_product(int own, bool accumulate) {
    pipe.wait_full();
    if constexpr (kMeetsNeighbours)
      if (own < kBf16BlockK) clear_neighbours(own);
#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave)
      Wgmma::multiply(acc[wave], ptx::wgmma_advance(first_a, (pipe.stage * C.block_m + wave * 64) * kLineBytes),
                      ptx::wgmma_advance(first_b, pipe.stage * C.block_n * kLineBytes), accumulate);
  }

  __device__ __forceinline__ void release(int stage) const {
    if (lane < (C.multicasts() ? C.cluster_size() : 1)) {
      if constexpr (C.multicasts())
        ptx::mbarrier_arrive_cluster(&pipe.empty[stage], lane);
      else
        ptx::mbarrier_arrive(&pipe.empty[stage]);
    }
  }

  // All of a tile, at least one k-block. `meanwhile` runs under the first.
  template <class Meanwhile>
  __device__ __forceinline__ void multiply(const KPart& part, const Meanwhile& meanwhile) {
    int own = part.end - part.begin;
    begin_product(own, false);
    meanwhile();
#pragma unroll 1
    for (int i = 1; i < part.count; ++i) {
      const int before = pipe.stage;
      pipe.advance();
      own -= kBf16BlockK;
      begin_product(own, true);
      ptx::wgmma_wait<C.num_waves()>();
      release(before);
    }
    ptx::wgmma_wait<0>();
    release(pipe.stage);
    pipe.advance();
#pragma unroll
    for (auto& wave : acc) Wgmma::pin(wave);
  }

  __device__ __forceinline__ void clear_neighbours(int own) const {
    constexpr int kThreads = C.num_consumers * kWarpgroup;
    if constexpr (C.grouping == Grouping::columns)
      clear_lines(smem.a(pipe.stage), C.block_m, own, threadIdx.x, kThreads);
    clear_lines(smem.b(pipe.stage), C.block_n, own, threadIdx.x, kThreads);
    ptx::fence_proxy_async();  // WGMMA reads what plain stores have written
    ptx::named_barrier_sync(1 + C.num_consumers, kThreads);
  }

  // Of a tile that has no row for this warpgroup: its stages pass by.
  __device__ void skip(int count) {
#pragma unroll 1
    for (; count > 0; --count, pipe.advance()) {
      pipe.wait_full();
      release(pipe.stage);
    }
  }

  __device__ void clear() {
#pragma unroll
    for (auto& wave : acc)
#pragma unroll
      for (float& x : wave) x = 0;
  }
};

// A persistent CTA: one tile after the other, each stored while the producer already fetches the next.
template <GemmConfig C>
__device__ void consume_bf16_tiles(const GemmParams& p, const SharedMemory<C>& smem, int consumer,
                                   const Begin<C>& begin) {
  // A warpgroup without rows has nothing to multiply; but who clears neighbours' columns needs all of them.
  constexpr bool kSkips = C.grouping == Grouping::rows && !Bf16Consumer<C>::kMeetsNeighbours;
  auto tiles = my_tiles<C>(p, smem);
  auto staged = smem.staged();
  Bf16Consumer<C> self(smem, consumer);
  Tile t, next;
  bool more = tiles.next(next);
  begin();
  while (more) {
    t = next;
    const KPart part = k_part<C>(p, t);
    const auto prepare = [&] {
      if constexpr (C.stores_by_tma())
        if (p.c_ptr != nullptr && threadIdx.x % kWarpgroup == 0) staged.load_c(p, t, consumer);
      more = tiles.next(next);
    };
    if (C.grouping == Grouping::columns && part.count == 0 && p.c_ptr != nullptr) {  // nothing to add
      prepare();
      continue;
    }
    if (kSkips && t.m + consumer * C.consumer_rows() >= t.group_end) {
      self.skip(part.count);
      prepare();
      continue;
    }
    if (part.count > 0) {
      self.multiply(part, prepare);
    } else {  // more parts of K than k-blocks, or a group without columns
      self.clear();
      prepare();
    }
    t = output_tile<C>(p, t);
    if constexpr (C.grouping == Grouping::columns)
      GradientStore<C>{smem.gradient(consumer)}.store(p, t, self.acc);
    else if constexpr (C.stores_by_tma())
      staged.store(p, t, consumer, self.acc);
    else if constexpr (C.split_k == 1)
      store_tile_direct<C>(p, t, consumer, self.acc);
    else
      SplitKReduction<C>{smem.partial()}.publish(consumer, self.acc);
  }
  if constexpr (C.stores_by_tma() || C.grouping == Grouping::columns) ptx::tma_store_wait_read();
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <GemmConfig C>
__device__ __forceinline__ void gemm_bf16(const GemmParams& p) {
  static_assert(C.operand == Operand::bf16);
  static_assert(C.grouping != Grouping::rows || C.major_a == Major::k, "groups begin at any row");
  static_assert(C.grouping != Grouping::columns || (C.major_a == Major::mn && C.major_b == Major::mn));
  static_assert(C.grouping != Grouping::columns || C.out == OutType::f32);
  const auto produce = [&](const SharedMemory<C>& smem, int warp, const Begin<C>& begin) {
    if (warp == 0)
      load_bf16_operands<C>(p, smem, begin);
    else
      begin();
  };
  run_roles<C>(p, produce, [&](const SharedMemory<C>& smem, int consumer, const Begin<C>& begin) {
    consume_bf16_tiles<C>(p, smem, consumer, begin);
  });
}

}  // namespace phalanx
