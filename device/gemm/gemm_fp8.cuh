// D[m, n] = sum over k-blocks of  sfa[m, kb] * sfb[n / 128, kb] * (A[m, kb] · B[n, kb])  (+ C[m, n])
//
// A, B: E4M3. A CTA is a ring of shared-memory stages, each one k-block (128 deep) of A, B and A's scales, between
//
//     producer warpgroup (one thread)                   consumer warpgroups (each owns rows of the tile)
//       wait empty[s]  <--------------------- empty[s]    wait full[s]
//       A, B, scales of A by TMA -----------> full[s]     64 x block_n x 128 by WGMMA, into `partial`
//                                                         arrive at empty[s]: the stage may be refilled
//                                                         promote: acc += scale_a * scale_b * partial
//
// The tensor cores sum one k-block only, in their own narrower accumulator; the promotion in FP32 registers is what
// makes the scaling fine-grained and the long sum accurate (docs/numerics.md).
#pragma once
#include "device/gemm/origin.cuh"
#include "device/gemm/promote.cuh"
#include "device/gemm/roles.cuh"
#include "device/ptx/wgmma.cuh"

namespace phalanx {

// --- producer -------------------------------------------------------------------------------------------------------

// One warp, of which one thread loads. What CTAs of a cluster share, each loads a slice of into all.
template <GemmConfig C>
__device__ void load_operands(const GemmParams& p, const SharedMemory<C>& smem, const Begin<C>& begin) {
  constexpr int kScaleBytes = 4 * C.scales_a_boxes() * C.scales_a_box();
  const bool loads_scales = !C.scales_b_by_row() && p.sfa_by_tma;
  int rows = p.rows_a;
  u32 stage_bytes = (rows + C.block_n) * kBlockK + (loads_scales ? kScaleBytes : 0);
  constexpr u16 kAllCtas = (1 << C.cluster_size()) - 1;
  const int rank = C.multicasts() ? ptx::cluster_ctarank() : 0;
  constexpr int kSliceA = C.block_m / C.cluster_n;
  const int slice_a = rank % C.cluster_n * kSliceA, slice_b = rank % C.cluster_m * (C.block_n / C.cluster_m);

  load_tiles<C>(p, smem, begin, [&](const Tile& t, auto& pipe) {
    const KRange ks = my_k_range<C>(p, t);
    const TileOrigin at = origin_of<C>(p, t);
    if constexpr (C.slices_last_rows()) {
      rows = min_of(ceil_div(t.group_end - t.m, C.rows_of_request()) * C.rows_of_request(), C.block_m);
      stage_bytes = (rows + C.block_n) * kBlockK + (loads_scales ? kScaleBytes : 0);
    }
    int slice_rows = kSliceA;
    const TensorMap* map_a = &p.a;
    if constexpr (C.grouping == Grouping::none) {  // none past the end: TMA takes longer to make zeros than to copy
      rows = min_of(p.m - t.m, C.block_m);
      if (rows < 0) rows = 0;  // of a cluster that reaches past M
      stage_bytes = (rows + C.block_n) * kBlockK + (loads_scales ? kScaleBytes : 0);
      slice_rows = min_of(rows - slice_a, kSliceA);
      if (slice_rows < kSliceA) map_a = &p.a_last;
    }
#pragma unroll 1
    for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance()) {
      const int k = kb * kBlockK, stage = pipe.stage;
      pipe.wait_empty();
      u64* full = &pipe.full[stage];
      ptx::mbarrier_arrive_expect_tx(full, stage_bytes);
      if (C.scales_b_by_row() && p.sfa_by_tma) {  // first, as they have to be split
        u64* whole = &smem.whole_scales().full[stage];
        ptx::mbarrier_arrive_expect_tx(whole, (C.block_m + C.block_n) * 4);
        ptx::tma_load_2d(smem.sfa(stage), &p.sfa_map, whole, t.m, kb);
        ptx::tma_load_2d(smem.sfb(stage), &p.sfb_map, whole, t.n, kb);
      }
      const auto load_a = [&] {
        if (C.slices_last_rows() && rows < C.block_m) {
#pragma unroll 1
          for (int row = 0; row < rows; row += C.rows_of_request())
            ptx::tma_load_2d(smem.a(stage) + row * kBlockK, &p.a_last, full, k, at.a + row);
        } else if (slice_rows > 0) {
          if constexpr (C.cluster_n > 1)
            ptx::tma_load_2d_multicast(smem.a(stage) + slice_a * kBlockK, map_a, full, k, at.a + slice_a, kAllCtas);
          else
            ptx::tma_load_2d(smem.a(stage), map_a, full, k, at.a);
        }
        if (loads_scales) {
#pragma unroll
          for (int i = 0; i < C.scales_a_boxes(); ++i)
            ptx::tma_load_2d(smem.sfa(stage) + i * C.scales_a_box_pitch(), &p.sfa_map, full,
                             at.sfa_row - at.sfa_shift() + i * (C.block_m / C.scales_a_boxes()), at.sfa_k + kb);
        }
      };
      const auto load_rows_b = [&](u8* to, int row) {
        if (C.may_read_b_once() && p.streams_b)
          ptx::tma_load_2d_once(to, &p.b, full, k, row);
        else
          ptx::tma_load_2d(to, &p.b, full, k, row);
      };
      const auto load_b = [&] {
        if constexpr (C.gates_and_ups()) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            load_rows_b(smem.b(stage) + half * (C.block_n / 2) * kBlockK, at.b - t.n / 2 + half * (p.n / 2));
        } else if constexpr (C.cluster_m > 1) {
          ptx::tma_load_2d_multicast(smem.b(stage) + slice_b * kBlockK, &p.b, full, k, at.b + slice_b, kAllCtas);
        } else {
          load_rows_b(smem.b(stage), at.b);
        }
      };
      // Without groups B first: few others read it, so that it comes from farther away. With groups that was 2 %
      // slower.
      if constexpr (!C.grouped()) load_b();
      load_a();
      if constexpr (C.grouped()) load_b();
      if constexpr (C.grouping == Grouping::columns)
        if (p.c_ptr != nullptr) GradientPanels<C>::prefetch(p, t.n, at.d, ks.end - 1 - kb);
    }
  });
}

// One warp, only where TMA cannot read A's scales: cp.async copies single floats, whatever their strides. It has
// barriers of its own, sfa_empty[s], at which every consumer thread arrives that has read its scales of stage s.
template <GemmConfig C>
__device__ void copy_scales(const GemmParams& p, const SharedMemory<C>& smem, const Begin<C>& begin) {
  constexpr GemmConfig config = C;  // see my_tiles
  const int lane = threadIdx.x % 32;
  begin();

  auto pipe = smem.pipeline();
  pipe.empty = smem.sfa_empty();
  auto tiles = my_tiles<C>(p, smem);
  for (Tile t; tiles.next(t);) {
    const KRange ks = my_k_range<C>(p, t);
    const int shift = origin_of<C>(p, t).sfa_shift();
    // Rows past the end keep what they hold: their results are not stored.
    const int rows = min_of(end_of_rows<C>(p, t) - t.m, C.block_m);
    const float* column = p.sfa + (t.m + lane) * p.sfa_stride_m + ks.begin * p.sfa_stride_k;
    if constexpr (C.grouping == Grouping::rows) column += t.group * p.groups.sfa_stride_g;
#pragma unroll 1
    for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance(), column += p.sfa_stride_k) {
      pipe.wait_empty();
      const float* scale = column;
#pragma unroll 1
      for (int row = lane; row < rows; row += 32, scale += 32 * p.sfa_stride_m)
        ptx::cp_async_4(&smem.sfa(pipe.stage)[config.scale_a_index(row) + shift], scale);
      ptx::mbarrier_arrive_cp_async(&pipe.full[pipe.stage]);
    }
  }
}

// --- consumers ------------------------------------------------------------------------------------------------------

// What a thread of a consumer warpgroup carries from one k-block to the next.
template <GemmConfig C>
struct Consumer {
  using Wgmma = ptx::WgmmaE4m3<C.block_n>;
  const GemmParams& p;
  const SharedMemory<C>& smem;
  Pipeline<C.num_stages> pipe;
  int lane, first_row;
  int sfa_shift = 0;     // from a row of the tile to its scale's place in a stage
  u64 first_a, first_b;  // descriptors of its rows of A and of B in stage 0
  ScalesB<C> sfb;
  Accumulator<C> acc;

  __device__ Consumer(const GemmParams& p_, const SharedMemory<C>& smem_, int consumer)
      : p(p_),
        smem(smem_),
        pipe(smem_.pipeline()),
        lane(threadIdx.x % 32),
        first_row(fragment_row<C>(consumer, 0)),
        first_a(first_of_a(smem_.a(0) + consumer * C.consumer_rows() * kBlockK)),
        first_b(ptx::wgmma_advance(first_a, int(smem_.b(0) - smem_.a(0)) - consumer * C.consumer_rows() * kBlockK)) {
    // In registers to stay: recomputed in the loop, as the compiler prefers, they would delay every product. For the same
    // reason B's descriptor is A's plus a number.
    ptx::keep_in_register(lane), ptx::keep_in_register(first_row);
  }
  __device__ static u64 first_of_a(const u8* rows) {
    const u64 descriptor = ptx::wgmma_descriptor(rows);
    return C.scales_b_by_row() ? ptx::wgmma_keep(descriptor) : descriptor;  // of gradients nothing less keeps it
  }

  // The time from the last promotion to the next product is lost to the tensor cores: all that can wait comes after the
  // product was issued. `meanwhile` runs there.
  // Of groups, two warpgroups also await the next k-block there, if there is `more`.
  static constexpr bool kAwaitsNext = C.grouped() && C.num_consumers == 2;
  template <bool kFirst, class Meanwhile>
  __device__ __forceinline__ void multiply_k_block(int position, bool more, Meanwhile meanwhile) {
    TileScalesB<C> scales_b;
    if (kFirst || !kAwaitsNext) pipe.wait_full();
#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave) {
      float partial[C.block_n / 2];
      Wgmma::multiply(partial, ptx::wgmma_advance(first_a, (pipe.stage * C.block_m + wave * 64) * kBlockK),
                      ptx::wgmma_advance(first_b, pipe.stage * C.block_n * kBlockK), false);
      const float* sfa = smem.sfa(pipe.stage) + first_row + sfa_shift + wave * 64;
      const float scales_a[2] = {sfa[0], sfa[8]};
      if (wave == 0) {
        scales_b = sfb.get(position);
        meanwhile();
      }
      if (kAwaitsNext && wave == C.num_waves() - 1 && more) {
        auto next = pipe;
        next.advance();
        next.wait_full();
      }
      ptx::wgmma_wait<0>();
      if (wave == C.num_waves() - 1) release_stage();
      Wgmma::pin(partial);  // after the release: no promotion goes before it
      promote<C, kFirst>(acc[wave], partial, scales_a, scales_b);
    }
    pipe.advance();
  }

  template <class Meanwhile>
  __device__ __forceinline__ void multiply_overlapped(const Tile& t, const KRange& ks, Meanwhile meanwhile) {
    float partial[2][C.block_n / 2], scales_a[2][2];
    auto ahead = pipe;
    const auto issue = [&](int slot) {
      ahead.wait_full();
      Wgmma::multiply(partial[slot], ptx::wgmma_advance(first_a, ahead.stage * C.block_m * kBlockK),
                      ptx::wgmma_advance(first_b, ahead.stage * C.block_n * kBlockK), false);
      const float* sfa = smem.sfa(ahead.stage) + first_row;
      scales_a[slot][0] = sfa[0], scales_a[slot][1] = sfa[8];
      ahead.advance();
    };
    const auto add = [&](int slot, int position) {
      release_stage();
      Wgmma::pin(partial[slot]);
      promote<C, false>(acc[0], partial[slot], scales_a[slot], sfb.get(position));
      pipe.advance();
    };
    int kb = ks.begin, position = 0;
    // With the product of `kb` in `slot` under way; whether there is another.
    const auto step = [&](int slot) {
      if (++kb == ks.end) {
        ptx::wgmma_wait<0>();
        add(slot, position);
        return false;
      }
      issue(1 - slot);
      ptx::wgmma_wait<1>();
      add(slot, position);
      if (++position == ScalesB<C>::kFetched) position = 0, sfb.fetch(p, t, kb, ks.end);
      return true;
    };
    issue(0);
    clear();
    meanwhile();
#pragma unroll 1
    while (step(0) && step(1)) continue;
  }

  __device__ __forceinline__ void release_stage() {
    if (lane < (C.multicasts() ? C.cluster_size() : 1)) {
      if constexpr (C.multicasts())
        ptx::mbarrier_arrive_cluster(&pipe.empty[pipe.stage], lane);
      else
        ptx::mbarrier_arrive(&pipe.empty[pipe.stage]);
    }
    if (copies_scales<C>(p)) ptx::mbarrier_arrive(&smem.sfa_empty()[pipe.stage]);
  }

  // Of a tile that has no row for this warpgroup: its stages pass by.
  __device__ void skip_k_blocks(int count) {
#pragma unroll 1
    for (; count > 0; --count, pipe.advance()) {
      pipe.wait_full();
      release_stage();
    }
  }

  __device__ void clear() {
#pragma unroll
    for (auto& wave : acc)
#pragma unroll
      for (float& x : wave) x = 0;
  }
};

// Of tiles that become D.
struct NoOtherStore {};

// A persistent CTA: one tile after the other, each stored while the producers already fetch the next.
template <GemmConfig C, class OtherStore = NoOtherStore>
__device__ void consume_tiles(const GemmParams& p, const SharedMemory<C>& smem, int consumer, const Begin<C>& begin,
                              OtherStore other_store = {}) {
  auto tiles = my_tiles<C>(p, smem);
  auto staged = smem.staged();
  const KRange ks = my_k_range<C>(p, {});
  Consumer<C> self(p, smem, consumer);
  ScalesB<C> next_sfb;
  Tile t, next;
  bool more = tiles.next(next);
  begin();
  if (more && ks.begin < ks.end) next_sfb.fetch(p, next, ks.begin, ks.end);
  while (more) {
    t = next;
    self.sfb = next_sfb;
    const auto prepare = [&] {
      if constexpr (C.stores_by_tma() && !C.grouped())
        if (p.c_ptr != nullptr && threadIdx.x % kWarpgroup == 0) staged.load_c(p, t, consumer);
      more = tiles.next(next);
      if (more) next_sfb.fetch(p, next, ks.begin, ks.end);
    };
    if constexpr (C.grouping == Grouping::rows)
      self.sfa_shift =
          origin_of<C>(p, t).sfa_shift() + (C.scale_a_index(C.consumer_rows()) - C.consumer_rows()) * consumer;
    if (C.split_k > 1 && ks.begin == ks.end) {  // more parts than k-blocks
      self.clear();
      more = false;
    } else if constexpr (C.overlaps()) {
      self.multiply_overlapped(t, ks, prepare);
    } else {
      self.template multiply_k_block<true>(0, ks.begin + 1 < ks.end, prepare);
    }
    // Every lane of a warp agrees; the vote tells the compiler.
    if (C.grouped() && __any_sync(0xffffffff, t.m + consumer * C.consumer_rows() >= t.group_end)) {
      self.skip_k_blocks(ks.end - 1);
      continue;
    }
#pragma unroll 2
    for (int kb = ks.begin + 1; !C.overlaps() && kb < ks.end; ++kb) {
      const int position = (kb - ks.begin) % ScalesB<C>::kFetched;
      self.template multiply_k_block<false>(position, kb + 1 < ks.end, [&] {
        if (position == ScalesB<C>::kFetched - 1 && kb + 1 < ks.end) self.sfb.fetch(p, t, kb + 1, ks.end);
      });
    }
    t = output_tile<C>(p, t);
    if constexpr (C.gates_and_ups())
      other_store(t, self.acc);
    else if constexpr (C.stores_by_tma())
      staged.store(p, t, consumer, self.acc);
    else if constexpr (C.split_k == 1)
      store_tile_direct<C>(p, t, consumer, self.acc);
    else
      SplitKReduction<C>{smem.partial()}.publish(consumer, self.acc);
  }
  if constexpr (C.stores_by_tma()) ptx::tma_store_wait_read();
}

// --- kernel ---------------------------------------------------------------------------------------------------------

// A product of E4M3.
template <GemmConfig C, class Consume>
__device__ __forceinline__ void run_fp8_roles(const GemmParams& p, const Consume& consume) {
  const auto produce = [&](const SharedMemory<C>& smem, int warp, const Begin<C>& begin) {
    if (warp == 0)
      load_operands<C>(p, smem, begin);
    else if (warp == 1 && copies_scales<C>(p))
      copy_scales<C>(p, smem, begin);
    else
      begin();
  };
  run_roles<C>(p, produce, consume);
}

template <GemmConfig C>
__device__ __forceinline__ void gemm_fp8(const GemmParams& p) {
  run_fp8_roles<C>(p, [&](const SharedMemory<C>& smem, int consumer, const Begin<C>& begin) {
    consume_tiles<C>(p, smem, consumer, begin);
  });
}

}  // namespace phalanx
