// h = silu(gate) * up * weight with [gate | up] = A · Bᵀ rounded to BF16, in E4M3 with a scale per 1 x 128: the product
// of device/gemm/gemm_fp8.cuh, grouped, and the quantiser of device/quantize/swiglu.cuh, to the bit, without what lies
// between them.
//
// A tile is of 64 gates and of the 64 ups that belong to them: a thread finds both in its own registers. Two CTAs side
// by side have the 128 columns of h that share a scale. They exchange the maxima of their rows, warp by warp:
//
//     a warp of this CTA                                the same warp of the other
//       64 columns of h, their largest magnitudes         (the same)
//       st.async into maxima[turn] there  -----------> full[turn] there: 4 bytes a row
//       wait full[turn] here  <----------------------    st.async into maxima[turn] here
//       scale, E4M3, and a quarter of a row's 64 bytes a lane
//
// Two turns suffice: the other CTA's warp sends the maxima of the tile after the next when all of ours have sent those
// of the next, which each does after it has read this tile's.
#pragma once
#include "device/gemm/gemm_fp8.cuh"
#include "device/moe/gemm_swiglu.h"
#include "device/quantize/encode.cuh"
#include "device/quantize/swiglu_pieces.cuh"

namespace phalanx {

// Lane q of four neighbours has word[i]; then it has what word[q] was in lane i.
__device__ __forceinline__ void transpose_over_quad(u32 (&word)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32 &low = word[distance == 1 ? 2 * i : i], &high = word[distance == 1 ? 2 * i + 1 : i + 2];
      const u32 taken = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      (upper ? low : high) = taken;
    }
  }
}

// What a consumer makes of a tile's sums: a thread has two rows of the warpgroup's 64, `half` 0 and 1, eight apart.
template <GemmConfig C>
struct SwigluStore {
  static_assert(C.block_n == 128 && C.num_waves() == 1);
  using Values = float[C.block_n / 2];                 // of a thread, as WGMMA leaves them: gates, then as many ups
  static constexpr int kOfRow = 16, kUp = 2 * kOfRow;  // gates of one of its rows; from a gate to its up
  const GemmSwigluParams& p;
  const SharedMemory<C>& smem;
  int consumer;
  u32 turn = 0;

  // f(index) for the gates of a row, or for what they have become.
  template <class F>
  static __device__ __forceinline__ void for_each(int half, F f) {
#pragma unroll
    for (int i = 0; i < kOfRow; ++i) f(i / 2 * 4 + half * 2 + i % 2);
  }

  // The gates of a row become h. Returns the largest finite magnitude.
  __device__ __forceinline__ float activate(Values& x, int half, float weight) const {
    constexpr float kMaxFinite = 0x1.fffffep127f;
#pragma unroll
    for (int i = half * 2; i < C.block_n / 2; i += 4) {
      const u32 pair = ptx::pack_bf16(x[i], x[i + 1]);
      x[i] = ptx::bf16_lo(pair), x[i + 1] = ptx::bf16_hi(pair);
    }
    if (p.limit <= kMaxFinite)
      for_each(half, [&](int i) {
        x[i] = DeviceMath::min(x[i], p.limit);
        x[i + kUp] = DeviceMath::max(DeviceMath::min(x[i + kUp], p.limit), -p.limit);
      });
    for_each(half, [&](int i) { x[i] = swiglu_value<DeviceMath, false>(x[i], x[i + kUp], p.limit); });
    if (p.weights) for_each(half, [&](int i) { x[i] *= weight; });
    float largest = 0;
    for_each(half, [&](int i) { largest = fmaxf(largest, fabsf(x[i])); });  // NaN is not the larger
    if (largest <= kMaxFinite) return largest;
    largest = 0;
    for_each(half, [&](int i) { largest = fmaxf(largest, fabsf(x[i]) <= kMaxFinite ? fabsf(x[i]) : 0.0f); });
    return largest;
  }

  // This lane's 16 columns of a row of h, of which it has pairs of all 64.
  __device__ __forceinline__ uint4 encode_row(const Values& x, int half, float inverse) const {
    u32 word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float *a = &x[i * 8 + half * 2], *b = a + 4;
      word[i] = encode_4(a[0] * inverse, a[1] * inverse, b[0] * inverse, b[1] * inverse);
    }
    transpose_over_quad(word);
    const auto lower = [](u32 a, u32 b) { return (a & 0xffff) | b << 16; };
    const auto upper = [](u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); };
    return {lower(word[0], word[1]), lower(word[2], word[3]), upper(word[0], word[1]), upper(word[2], word[3])};
  }

  // The maxima of one row's 64 columns are on their way while the other row's are computed.
  __device__ __forceinline__ void operator()(const Tile& t, Accumulator<C>& acc) {
    const int lane = threadIdx.x % 32, row = t.m + fragment_row<C>(consumer, 0);
    Values& x = acc[0];
    float weight[2] = {1, 1}, largest[2];
    if (p.weights) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (row + half * 8 < t.group_end) weight[half] = p.weights[(row + half * 8) * p.weight_stride];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& mine = largest[half] = activate(x, half, weight[half]);
#pragma unroll
      for (int distance = 1; distance <= 2; distance *= 2)
        mine = fmaxf(mine, __shfl_xor_sync(0xffffffffu, mine, distance));
      give(half, mine);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = scale_of(fmaxf(largest[half], take(half)), p.pow2_scales);
      const uint4 bytes = encode_row(x, half, __frcp_rn(scale));
      const i64 at = row + half * 8;
      if (at >= t.group_end) continue;
      *reinterpret_cast<uint4*>(p.q.data + at * p.q.stride + t.n / 2 + lane % 4 * 16) = bytes;
      if (t.n % (2 * C.block_n) == 0 && lane % 4 == 0)
        p.q.scales[at * p.q.scale_stride_row + t.n / 2 / kQuantizeBlock * p.q.scale_stride_col] = scale;
    }
    ++turn;
  }

  // Of both CTAs, at the same place: a turn's maxima of this consumer's rows, and the barrier that they come with.
  __device__ __forceinline__ int place(int half) const { return (turn % 2 * 2 + half) * C.num_consumers + consumer; }
  __device__ __forceinline__ float* slot(int half) const {
    return smem.maxima() + place(half) * (kWarpgroup / 4) + threadIdx.x % kWarpgroup / 4;
  }
  __device__ __forceinline__ void give(int half, float maximum) const {
    u64* full = &smem.maxima_full()[place(half)];
    if (threadIdx.x % kWarpgroup == 0) ptx::mbarrier_arrive_expect_tx(full, kWarpgroup / 4 * 4);
    if (threadIdx.x % 4 == 0) ptx::store_async_cluster_f32(slot(half), maximum, full, ptx::cluster_ctarank() ^ 1);
  }
  __device__ __forceinline__ float take(int half) const {
    ptx::mbarrier_wait(&smem.maxima_full()[place(half)], turn / 2 % 2);
    return *slot(half);
  }
};

template <GemmConfig C>
__device__ __forceinline__ void gemm_swiglu(const GemmSwigluParams& p) {
  run_fp8_roles<C>(p.gemm, [&](const SharedMemory<C>& smem, int consumer, const Begin<C>& begin) {
    consume_tiles<C>(p.gemm, smem, consumer, begin, SwigluStore<C>{p, smem, consumer});
  });
}

}  // namespace phalanx
