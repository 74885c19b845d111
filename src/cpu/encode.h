// From FP32 values to E4M3 and scales: the steps of docs/numerics.md. Simple loops over a row of a block, each of which
// the compiler vectorises.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/convert.h"
#include "device/quantize/config.h"

namespace phalanx::cpu {

/// FP32 elements of one row of a block.
using Row = std::array<float, kQuantizeBlock>;

template <class T>
void widen(const T* x, std::int64_t count, Row& row) {
  for (std::int64_t i = 0; i < count; ++i) row[i] = to_f32(x[i]);
}

inline float larger_if_finite(float amax, float x) {
  const float magnitude = std::fabs(x);
  const float finite = magnitude < std::numeric_limits<float>::infinity() ? magnitude : 0.0f;  // false for NaN
  return amax < finite ? finite : amax;
}

/// The largest finite |x|. The maximum is taken in lanes, as its order does not matter.
inline float finite_amax(const Row& row, std::int64_t count) {
  constexpr int kLanes = 8;
  float lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = larger_if_finite(lanes[lane], row[i + lane]);
  }
  for (; i < count; ++i) lanes[0] = larger_if_finite(lanes[0], row[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

inline void encode(const Row& row, float inv, std::int64_t count, E4m3* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = from_f32<E4m3>(row[i] * inv);
}

inline float scale_for(float amax, bool pow2) {
  const float scale = std::max(amax / kE4m3Max, kMinScale);
  return pow2 ? std::bit_cast<float>(pow2_ceil_bits(std::bit_cast<u32>(scale))) : scale;
}

/// A row that has a scale of its own. Returns it.
inline float quantize_row(const Row& row, std::int64_t count, bool pow2, E4m3* out) {
  const float scale = scale_for(finite_amax(row, count), pow2);
  encode(row, 1.0f / scale, count, out);
  return scale;
}

}  // namespace phalanx::cpu
