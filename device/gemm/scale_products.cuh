// Where both operands have a scale per row, sfa[m] * sfb[n] of a tile by the tensor cores. Every value of a k-block has
// a product of its own: computed by the threads that hold the values, they cost as much as the promotion, and reads of
// shared memory that stand behind the tensor cores' own.
//
// A scale is a sum of two numbers of TF32, 11 bits of its significand and the next 11, but for the last 2 bits of 24.
// One WGMMA, 64 x block_n x 8, sums the four products that two scales' parts make; the other half is zeros.
//
//     sfa    a0 a0 a1 a1  0 0 0 0
//     sfb    b0 b1 b0 b1  0 0 0 0
//
// Two warps of the producer write these rows into each stage, one A's, one B's:
//
//     wait empty[s]; rows of the k-block's scales, by plain stores; arrive at full[s]
//
// The consumers' fence stands between these stores and WGMMA: with it here, these warps were what all waited for.
#pragma once
#include "device/gemm/roles.cuh"
#include "device/ptx/wgmma_tf32.cuh"

namespace phalanx {

// Row `row` of an operand of wgmma_descriptor_plain, its first half; the second is 8 places further on.
__device__ __forceinline__ float4* parts_of_row(u8* operand, int row) {
  return reinterpret_cast<float4*>(operand + row / 8 * 8 * kScalePartsBytes) + row % 8;
}

// What is not finite is one part, and zeros: as if multiplied in FP32, infinity by a number is infinity, by 0 NaN.
template <bool kOfB>
__device__ __forceinline__ float4 parts_of(float x) {
  constexpr u32 kTf32 = 0xffffe000, kInfinity = 0x7f800000;
  const bool finite = (__float_as_uint(x) & kInfinity) != kInfinity;
  const float x0 =
      finite ? __uint_as_float(__float_as_uint(x) & kTf32) : x + x;  // the NaN of additions: one in TF32, too
  const float again = finite ? x0 : 0;                               // in its second place
  const float x1 = finite ? x - x0 : 0;
  return kOfB ? make_float4(x0, x1, again, x1) : make_float4(x0, again, x1, x1);
}

// One warp, for A or for B: scales by TMA into slots of its own, ahead of the stages. Where TMA cannot read them, lanes
// do, each those of its rows, a k-block ahead. What is past the last row reaches no value that is stored.
template <GemmConfig C, bool kOfB>
__device__ void split_scales(const GemmParams& p, const SharedMemory<C>& smem) {
  constexpr int kRows = kOfB ? C.block_n : C.block_m, kOfLane = kRows / 32;
  const int lane = threadIdx.x % 32;
  const auto operand = [&](int stage) { return kOfB ? smem.parts_b(stage) : smem.parts_a(stage); };
  const auto staged = [&](int slot) { return kOfB ? smem.sfb(slot) : smem.sfa(slot); };
#pragma unroll 1
  for (int i = lane; i < C.num_stages * kRows; i += 32)
    parts_of_row(operand(i / kRows), i % kRows)[8] = make_float4(0, 0, 0, 0);

  auto pipe = smem.pipeline(), slots = smem.scale_slots(kOfB);
  auto tiles = my_tiles<C>(p, smem);
  for (Tile t; tiles.next(t);) {
    const KRange ks = k_range(t);
    const int row = kOfB ? t.n : t.m;
    const auto load = [&](int slot, int kb) {
      if (!p.sfa_by_tma || kb >= ks.end || lane != 0) return;
      ptx::mbarrier_arrive_expect_tx(&slots.full[slot], kRows * 4);
      ptx::tma_load_2d(staged(slot), kOfB ? &p.sfb_map : &p.sfa_map, &slots.full[slot], row, kb);
    };
    float mine[kOfLane] = {};
    const auto read = [&](int kb) {
      if (p.sfa_by_tma || kb >= ks.end) return;
      const float* column = kOfB ? p.sfb + kb * p.sfb_stride_k : p.sfa + kb * p.sfa_stride_k;
      const i64 stride = kOfB ? p.sfb_stride_n : p.sfa_stride_m;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) mine[i] = column[min_of(row + lane + i * 32, (kOfB ? p.n : p.m) - 1) * stride];
    };

    auto first = slots;
#pragma unroll 1
    for (int i = 0; i < C.num_stages; ++i, first.advance()) load(first.stage, ks.begin + i);
    read(ks.begin);
#pragma unroll 1
    for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance(), slots.advance()) {
      if (p.sfa_by_tma) {
        slots.wait_full();
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) mine[i] = staged(slots.stage)[lane + i * 32];
        __syncwarp();
        load(slots.stage, kb + C.num_stages);
      }
      pipe.wait_empty();
      // Neighbouring rows of B change places: sum_columns says why.
#pragma unroll
      for (int i = 0; i < kOfLane; ++i)
        *parts_of_row(operand(pipe.stage), (kOfB ? lane ^ 1 : lane) + i * 32) = parts_of<kOfB>(mine[i]);
      ptx::mbarrier_arrive(&pipe.full[pipe.stage]);
      read(kb + 1);
    }
  }
}

}  // namespace phalanx
