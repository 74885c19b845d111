// device/quantize/swiglu.h on pieces of rows.
#pragma once
#include "device/quantize/params.h"
#include "device/quantize/piece.cuh"
#include "device/quantize/swiglu.h"

namespace phalanx {

// The operations that it asks for.
struct DeviceMath {
  static __device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static __device__ __forceinline__ float min(float a, float b) { return ptx::min_nan(a, b); }
  static __device__ __forceinline__ float max(float a, float b) { return ptx::max_nan(a, b); }
  static __device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
  static __device__ __forceinline__ float float_of(u32 bits) { return __uint_as_float(bits); }
  // __frcp_rn without the way out for numbers that cannot occur. One Newton step makes it exact.
  static __device__ __forceinline__ float reciprocal(float d) {
    const float y = ptx::rcp_approx_ftz(d);
    return __fmaf_rn(y, __fmaf_rn(-d, y, 1.0f), y);
  }
};

// Whether gate and up are clamped at all; what is not need not be computed.
__device__ __forceinline__ bool has_limit(float limit) { return limit != __uint_as_float(0x7f800000u); }

// Of kRows rows from `row` on, of which `rows` exist.
template <int kRows>
__device__ __forceinline__ void load_weights(float (&weight)[kRows], const float* weights, i64 stride, i64 row,
                                             i64 rows) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) weight[r] = weights && r < rows ? weights[(row + r) * stride] : 1.0f;
}

// What a tile's rows of the result are made of. `tile`: row, rows that exist, and column and columns of the result.
template <int kRows, class P, class Tile>
__device__ __forceinline__ void load_swiglu(P (&gate)[kRows], P (&up)[kRows], const SwigluParams& p, const Tile& tile) {
  const i64 gate_col = swiglu_gate_column(tile.col, p.interleaved);
  const u8* from = static_cast<const u8*>(p.x) + (tile.row * p.x_stride + gate_col) * P::kSize;
  load_rows(gate, from, p.x_stride, tile.rows, tile.cols, p.vectors);
  from += swiglu_up_distance(p.cols, p.interleaved) * P::kSize;
  load_rows(up, from, p.x_stride, tile.rows, tile.cols, p.vectors);
}

template <bool kLimited, int kRows, FloatType T>
__device__ __forceinline__ void swiglu_values(Piece<FloatType::f32, piece_count(T)> (&h)[kRows],
                                              const Piece<T> (&gate)[kRows], const Piece<T> (&up)[kRows], float limit) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < piece_count(T); ++i)
      h[r].word[i] = __float_as_uint(swiglu_value<DeviceMath, kLimited>(gate[r][i], up[r][i], limit));
}

// Most have no limit, and then no work with it. One row is too short for that.
template <int kRows, FloatType T>
__device__ __forceinline__ void swiglu_pieces(Piece<FloatType::f32, piece_count(T)> (&h)[kRows],
                                              const Piece<T> (&gate)[kRows], const Piece<T> (&up)[kRows], float limit) {
  if (kRows > 1 && !has_limit(limit))
    swiglu_values<false>(h, gate, up, limit);
  else
    swiglu_values<true>(h, gate, up, limit);
}

// Most have no weights, and then no work with them.
template <int kRows, int kCount, class Tile>
__device__ __forceinline__ void weight_pieces(Piece<FloatType::f32, kCount> (&h)[kRows], const SwigluParams& p,
                                              const Tile& tile) {
  if (!p.weights) return;
  float weight[kRows];
  load_weights(weight, p.weights, p.weight_stride, tile.row, tile.rows);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kCount; ++i) h[r].word[i] = __float_as_uint(h[r][i] * weight[r]);
}

// Turns gate and up into their gradients. Returns the sum of grad times the unweighted result.
template <bool kLimited, class P>
__device__ __forceinline__ float backward_piece(P& gate, P& up, const P& grad, float limit, float weight) {
  float sum = 0;
  const auto gradient = [&](int i) {
    const SwigluGradient g = swiglu_gradient<DeviceMath, kLimited>(gate[i], up[i], limit, grad[i] * weight);
    sum += grad[i] * g.unweighted;
    return g;
  };
#pragma unroll
  for (int i = 0; i < P::kCount; i += 2) {
    const SwigluGradient a = gradient(i), b = gradient(i + 1);
    gate.set_pair(i, a.gate, b.gate);
    up.set_pair(i, a.up, b.up);
  }
  return sum;
}

}  // namespace phalanx
