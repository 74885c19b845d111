// The promotion: a k-block's sums, which the tensor cores left in their narrower accumulators, scaled and added in
// FP32. And the scales of B, which a warp keeps in its registers.
#pragma once
#include "device/gemm/params.h"
#include "device/gemm/tiles.h"

namespace phalanx {

// Of the k-block at hand: one scale of B, or two and where in the tile the second begins.
template <GemmConfig C>
struct TileScalesB {
  float value[C.num_scales_b()];
  int second;

  __device__ __forceinline__ float of(int column) const {
    if constexpr (C.num_scales_b() == 1) return value[0];
    if constexpr (C.gates_and_ups()) return value[column >= C.block_n / 2];
    return column < second ? value[0] : value[C.num_scales_b() - 1];
  }
};

// acc += scale_a * scale_b * partial, for one wave; the first k-block of a tile begins the sum, from 0, as a first product
// may be -0: the sign must not depend on the tile either.
template <GemmConfig C, bool kFirst>
__device__ __forceinline__ void promote(float (&acc)[C.block_n / 2], const float (&partial)[C.block_n / 2],
                                        const float (&scales_a)[2], const TileScalesB<C>& scales_b) {
  constexpr int kGroupValues = C.scale_group() / 2;  // of a thread: two rows, a quarter of the columns
#pragma unroll
  for (int begin = 0; begin < C.block_n / 2; begin += kGroupValues) {
    const float scale_b = scales_b.of(begin * 2);
    const float scales[2] = {scales_a[0] * scale_b, scales_a[1] * scale_b};
#pragma unroll
    for (int i = begin; i < begin + kGroupValues; ++i)
      acc[i] = (kFirst ? 0.0f : acc[i]) + scales[i / 2 % 2] * partial[i];
  }
}

// B's scales of a tile: a warp fetches those of 32 k-blocks at once, one a lane, well before they are needed. No __ldg:
// the previous kernel may have written them.
template <GemmConfig C>
struct ScalesB {
  static constexpr int kFetched = 32;
  float of_lane[C.num_scales_b()];
  int second;

  __device__ __forceinline__ void fetch(const GemmParams& p, const Tile& t, int kb, int end) {
    const float* row = p.sfb + min_of(kb + int(threadIdx.x % 32), end - 1) * p.sfb_stride_k;
    if constexpr (C.grouping == Grouping::rows) row += t.group * p.groups.sfb_stride_g;
    if constexpr (C.gates_and_ups()) {
      const int gate = t.n / 2 / kScaleBlock;
      of_lane[0] = row[gate * p.sfb_stride_n], of_lane[1] = row[(gate + p.n / 2 / kScaleBlock) * p.sfb_stride_n];
      return;
    }
    second = kScaleBlock - t.n % kScaleBlock;
#pragma unroll
    for (int i = 0; i < C.num_scales_b(); ++i)  // clamped: a tile may begin or end past a ragged N
      of_lane[i] = row[min_of(t.n / kScaleBlock + i, (p.n - 1) / kScaleBlock) * p.sfb_stride_n];
  }
  __device__ __forceinline__ TileScalesB<C> get(int position) const {
    TileScalesB<C> scales;
    scales.second = second;
#pragma unroll
    for (int i = 0; i < C.num_scales_b(); ++i) scales.value[i] = __shfl_sync(0xffffffff, of_lane[i], position);
    return scales;
  }
};

}  // namespace phalanx
