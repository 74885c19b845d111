// Where both operands have a scale per row, sfa[m] * sfb[n] of a tile by the tensor cores. Every value of a k-block has
// a product of its own: computed by the threads that hold the values, they cost as much as the promotion, and reads of
// shared memory that stand behind the tensor cores' own.
//
// A scale is a sum of two numbers of TF32, 11 bits of its significand and the next 11, but for the last 2 bits of 24.
// One WGMMA, 64 x block_n x 8, sums the four products that two scales' parts make; the other half is zeros, the same for
// all stages and both operands.
//
//     sfa    a0 a0 a1 a1  0 0 0 0
//     sfb    b0 b1 b0 b1  0 0 0 0
//
// Two warps of the producer write these rows into each stage, one A's, one B's:
//
//     wait whole_scales[s], which TMA fills; rows of the k-block's scales, by plain stores; arrive at full[s]
//
// The consumers' fence stands between these stores and WGMMA: with it here, these warps were what all waited for.
#pragma once
#include "device/gemm/roles.cuh"
#include "device/ptx/wgmma_tf32.cuh"

namespace phalanx {

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

// The scales of A's or of B's rows of a tile, each lane those of some rows.
template <GemmConfig C, bool kOfB>
struct ScaleRows {
  static constexpr int kRows = kOfB ? C.block_n : C.block_m, kOfLane = kRows / 32;
  const GemmParams& p;
  const SharedMemory<C>& smem;
  int lane = threadIdx.x % 32;
  float mine[kOfLane] = {};

  __device__ __forceinline__ void take(int stage) {
    const float* scales = kOfB ? smem.sfb(stage) : smem.sfa(stage);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) mine[i] = scales[lane + i * 32];
  }
  // What is past the last row reaches no value that is stored.
  __device__ __forceinline__ void read(const Tile& t, int kb) {
    const int row = (kOfB ? t.n : t.m) + lane, last = (kOfB ? p.n : p.m) - 1;
    const float* column = kOfB ? p.sfb + kb * p.sfb_stride_k : p.sfa + kb * p.sfa_stride_k;
    const i64 stride = kOfB ? p.sfb_stride_n : p.sfa_stride_m;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) mine[i] = column[min_of(row + i * 32, last) * stride];
  }
  // Neighbouring rows of B change places: sum_columns says why.
  __device__ __forceinline__ void put(int stage) const {
    float4* parts = reinterpret_cast<float4*>(kOfB ? smem.parts_b(stage) : smem.parts_a(stage));
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) parts[(kOfB ? lane ^ 1 : lane) + i * 32] = parts_of<kOfB>(mine[i]);
  }
};

// One warp. TMA brings scales with their stage; where it cannot read them, lanes do, a k-block ahead.
template <GemmConfig C, bool kOfB>
__device__ void split_scales(const GemmParams& p, const SharedMemory<C>& smem) {
  ScaleRows<C, kOfB> rows{p, smem};
  if constexpr (kOfB)  // of whom there are no fewer rows than a consumer has
    for (int i = rows.lane; i < C.block_n; i += 32) reinterpret_cast<float4*>(smem.zeros())[i] = {};
  auto pipe = smem.pipeline(), whole = smem.whole_scales();
  auto tiles = my_tiles<C>(p, smem);
  for (Tile t; tiles.next(t);) {
    const KRange ks = k_range(t);
    if (p.sfa_by_tma) {
#pragma unroll 1
      for (int kb = ks.begin; kb < ks.end; ++kb, whole.advance()) {
        whole.wait_full();
        rows.take(whole.stage);
        rows.put(whole.stage);
        ptx::mbarrier_arrive(&pipe.full[whole.stage]);
      }
    } else if (ks.begin < ks.end) {
      rows.read(t, ks.begin);
#pragma unroll 1
      for (int kb = ks.begin; kb < ks.end; ++kb, pipe.advance()) {
        pipe.wait_empty();
        rows.put(pipe.stage);
        ptx::mbarrier_arrive(&pipe.full[pipe.stage]);
        if (kb + 1 < ks.end) rows.read(t, kb + 1);
      }
    }
  }
}

}  // namespace phalanx
