// From values to E4M3 and scales, in FP32 with IEEE rounding, as src/cpu/quantize.cpp does: the two give the same
// bytes.
//
//   scale = max(amax / 448, 2^-126), amax over a block's finite elements; rounded up to a power of two on request
//   q = e4m3(x * (1 / scale))
#pragma once
#include "device/quantize/params.h"
#include "device/quantize/piece.cuh"

namespace phalanx {

__device__ __forceinline__ float scale_of(float amax, bool pow2) {
  const float scale = fmaxf(__fdiv_rn(amax, kE4m3Max), kMinScale);
  return pow2 ? __uint_as_float(pow2_ceil_bits(__float_as_uint(scale))) : scale;
}

__device__ __forceinline__ u32 encode_4(float a, float b, float c, float d) {
  return ptx::pack_e4m3(a, b) | u32(ptx::pack_e4m3(c, d)) << 16;
}

template <class P>
__device__ __forceinline__ void encode(u32 (&word)[P::kCount / 4], const P& x, float inverse) {
#pragma unroll
  for (int i = 0; i < P::kCount; i += 4)
    word[i / 4] = encode_4(x[i] * inverse, x[i + 1] * inverse, x[i + 2] * inverse, x[i + 3] * inverse);
}

// Reduces kRows values over kLanes neighbouring lanes; each lane is left with the maximum of value[lane % kRows]. At
// each of the first steps a lane keeps half of its values, and gives the other half to a lane that keeps those.
template <int kLanes, int kRows>
__device__ __forceinline__ u32 max_over_lanes(u32 (&value)[kRows]) {
#pragma unroll
  for (int half = kRows / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const u32 given = upper ? value[i] : value[i + half], kept = upper ? value[i + half] : value[i];
      value[i] = max(kept, __shfl_xor_sync(0xffffffffu, given, half));
    }
  }
#pragma unroll
  for (int distance = kRows; distance < kLanes; distance *= 2)
    value[0] = max(value[0], __shfl_xor_sync(0xffffffffu, value[0], distance));
  return value[0];
}

// 1 x 128: a warp writes its pieces of kRows rows from [row, col] on, of which `rows` and `cols` (from this thread's
// col) exist. All lanes take part.
template <FloatType T, int kCount, int kRows>
__device__ __forceinline__ void quantize_pieces(const Piece<T, kCount> (&x)[kRows], const ScaledMatrix& q, i64 row,
                                                int col, i64 rows, int cols, bool vectors, bool pow2) {
  constexpr int kLanes = Piece<T, kCount>::kLanes;
  u32 magnitude[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) magnitude[r] = finite_maximum(x[r]);
  const u32 maximum = max_over_lanes<kLanes>(magnitude);  // of row lane % kRows
  const float scale = scale_of(Magnitudes<T>::value(maximum), pow2), inverse = __frcp_rn(scale);

  const int lane = threadIdx.x % kLanes;
  if (lane < kRows && lane < rows && cols + lane * kCount > 0)
    q.scales[(row + lane) * q.scale_stride_row + col / kQuantizeBlock * q.scale_stride_col] = scale;
  u8* to = q.data + row * q.stride + col;
  const auto encode_and_store = [&](bool in_vectors) {  // a row at a time, as registers are few
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      u32 word[1][kCount / 4];
      encode(word[0], x[r], kRows == 1 ? inverse : __shfl_sync(0xffffffffu, inverse, r, kLanes));
      store_rows<1>(to + r * q.stride, word, q.stride, rows - r, cols, in_vectors);
    }
  };
  if (vectors)
    encode_and_store(true);
  else
    encode_and_store(false);
}

}  // namespace phalanx
