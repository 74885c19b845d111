// Neighbouring elements of a row in registers, as they lie in memory: what a thread loads and stores at once.
#pragma once
#include "device/ptx/arithmetic.cuh"
#include "device/ptx/convert.cuh"
#include "device/quantize/config.h"

namespace phalanx {

template <FloatType T, int kElements = piece_count(T)>
struct Piece {
  static constexpr FloatType kType = T;
  static constexpr int kCount = kElements, kSize = T == FloatType::f32 ? 4 : 2;
  static constexpr int kBytes = kCount * kSize, kWords = kBytes / 4;
  static constexpr int kLanes = kQuantizeBlock / kCount;  // that share the columns of a block
  u32 word[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (T == FloatType::f32) return __uint_as_float(word[i]);
    const u32 pair = word[i / 2];
    if constexpr (T == FloatType::bf16) return i % 2 ? ptx::bf16_hi(pair) : ptx::bf16_lo(pair);
    return ptx::f16_to_float(u16(i % 2 ? pair >> 16 : pair));
  }
  __device__ __forceinline__ void set_pair(int i, float lo, float hi) {  // elements i and i + 1, i even
    if constexpr (T == FloatType::f32)
      word[i] = __float_as_uint(lo), word[i + 1] = __float_as_uint(hi);
    else
      word[i / 2] = T == FloatType::bf16 ? ptx::pack_bf16(lo, hi) : ptx::pack_f16(lo, hi);
  }
};

// --- memory ----------------------------------------------------------------------------------------------------------

// kBytes, at a multiple of that.
template <int kBytes>
__device__ __forceinline__ void load_vector(u32 (&word)[kBytes / 4], const void* data) {
  if constexpr (kBytes == 4) {
    word[0] = *static_cast<const u32*>(data);
  } else if constexpr (kBytes == 8) {
    const uint2 v = *static_cast<const uint2*>(data);
    word[0] = v.x, word[1] = v.y;
  } else {
    const uint4 v = *static_cast<const uint4*>(data);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  }
}
template <int kBytes>
__device__ __forceinline__ void store_vector(void* data, const u32 (&word)[kBytes / 4]) {
  if constexpr (kBytes == 4) *static_cast<u32*>(data) = word[0];
  if constexpr (kBytes == 8) *static_cast<uint2*>(data) = make_uint2(word[0], word[1]);
  if constexpr (kBytes == 16) *static_cast<uint4*>(data) = make_uint4(word[0], word[1], word[2], word[3]);
}

// Elements of kSize bytes enter words at the upper end, and leave them at the lower.
template <int kSize, int kWords>
__device__ __forceinline__ void shift_in(u32 (&word)[kWords], u32 element) {
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    word[i] = kSize == 4 ? (i + 1 < kWords ? word[i + 1] : element)
                         : __funnelshift_r(word[i], i + 1 < kWords ? word[i + 1] : element, 8 * kSize);
}
template <int kSize>
using Element = typename Conditional<kSize == 4, u32, typename Conditional<kSize == 2, u16, u8>::Type>::Type;

// A thread's words of kRows neighbouring rows, of which `rows` exist, and `cols` elements of kSize bytes (both may be
// more, or negative). What does not exist is zero, or not stored. Without `vectors`, element by element: in loops, to
// be short.
template <int kSize, int kRows, int kWords>
__device__ __forceinline__ void load_rows(u32 (&word)[kRows][kWords], const void* data, i64 stride, i64 rows, int cols,
                                          bool vectors) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[r][i] = 0;
  if (vectors) {
    if (cols <= 0) return;
    const u8* from = static_cast<const u8*>(data);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) load_vector<kWords * 4>(word[r], from + r * stride * kSize);
  } else {
    const auto* from = static_cast<const Element<kSize>*>(data);
#pragma unroll
    for (int r = 0; r < kRows; ++r, from += stride) {
#pragma unroll 1
      for (int i = 0; i < kWords * 4 / kSize; ++i) shift_in<kSize>(word[r], r < rows && i < cols ? from[i] : 0);
    }
  }
}
template <int kSize, int kRows, int kWords>
__device__ __forceinline__ void store_rows(void* data, u32 (&word)[kRows][kWords], i64 stride, i64 rows, int cols,
                                           bool vectors) {
  if (vectors) {
    if (cols <= 0) return;
    u8* to = static_cast<u8*>(data);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) store_vector<kWords * 4>(to + r * stride * kSize, word[r]);
  } else {
    auto* to = static_cast<Element<kSize>*>(data);
#pragma unroll 1
    for (int i = 0; i < kWords * 4 / kSize && i < cols; ++i, ++to) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) to[r * stride] = Element<kSize>(word[r][0]);
        shift_in<kSize>(word[r], 0);
      }
    }
  }
}

template <class P, int kRows>
__device__ __forceinline__ void load_rows(P (&x)[kRows], const void* data, i64 stride, i64 rows, int cols,
                                          bool vectors) {
  u32 word[kRows][P::kWords];
  load_rows<P::kSize>(word, data, stride, rows, cols, vectors);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < P::kWords; ++i) x[r].word[i] = word[r][i];
}

template <class P, int kRows>
__device__ __forceinline__ void store_rows(void* data, const P (&x)[kRows], i64 stride, i64 rows, int cols,
                                           bool vectors) {
  u32 word[kRows][P::kWords];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < P::kWords; ++i) word[r][i] = x[r].word[i];
  store_rows<P::kSize>(data, word, stride, rows, cols, vectors);
}

// --- magnitudes ------------------------------------------------------------------------------------------------------

// |x| of the elements in a word, two to a word in 16-bit types, as signed integers: the bits without the sign, and
// kZero added, which makes NaN and infinity negative. The maximum with kZero is of the finite ones then, or zero's.
// FP32 as what it is: infinity becomes NaN, which a maximum passes over. That leaves the integer units, which are what
// tiles of both ways wait for, one instruction of three.
template <FloatType T>
struct Magnitudes {
  static constexpr u32 kZeroOfOne = T == FloatType::f16 ? 0x0400 : T == FloatType::bf16 ? 0x0080 : 0;
  static constexpr u32 kZero = kZeroOfOne * 0x10001u;

  static __device__ __forceinline__ u32 of(u32 word) {
    if constexpr (T != FloatType::f32) return ptx::add_u16x2(word & 0x7fff7fffu, kZero);
    const float x = __uint_as_float(word);
    return __float_as_uint(fabsf(__fmaf_rn(x, 0.0f, x)));
  }
  static __device__ __forceinline__ u32 max(u32 a, u32 b) {
    if constexpr (T != FloatType::f32) return ptx::max_s16x2(a, b);
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  // Of maxima: the larger of those in a word, and its value.
  static __device__ __forceinline__ u32 largest(u32 m) { return T == FloatType::f32 ? m : ::max(m & 0xffffu, m >> 16); }
  static __device__ __forceinline__ float value(u32 maximum) {
    const u32 magnitude = maximum - kZeroOfOne;
    if constexpr (T == FloatType::f32) return __uint_as_float(magnitude);
    return T == FloatType::bf16 ? ptx::bf16_to_float(u16(magnitude)) : ptx::f16_to_float(u16(magnitude));
  }
};

// The largest finite magnitudes among kCount words.
template <FloatType T, int kCount, class Word>
__device__ __forceinline__ u32 finite_maximum(const Word& word) {
  using M = Magnitudes<T>;
  u32 maximum = M::kZero;
#pragma unroll
  for (int i = 0; i < kCount; ++i) maximum = M::max(maximum, M::of(word(i)));
  return maximum;
}

template <FloatType T, int kCount>
__device__ __forceinline__ u32 finite_maximum(const Piece<T, kCount>& x) {
  return Magnitudes<T>::largest(finite_maximum<T, Piece<T, kCount>::kWords>([&](int i) { return x.word[i]; }));
}

}  // namespace phalanx
