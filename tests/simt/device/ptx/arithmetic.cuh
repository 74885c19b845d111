#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline u32 add_u16x2(u32 a, u32 b) { return u16(a + b) | ((a >> 16) + (b >> 16)) << 16; }
inline u32 max_s16x2(u32 a, u32 b) {
  const auto larger = [](u32 x, u32 y) { return u32(u16(std::int16_t(x) > std::int16_t(y) ? x : y)); };
  return larger(a, b) | larger(a >> 16, b >> 16) << 16;
}
inline float min_nan(float a, float b) { return a != a ? a : b < a || b != b ? b : a; }
inline float max_nan(float a, float b) { return a != a ? a : b > a || b != b ? b : a; }
inline float rcp_approx_ftz(float x) { return 1.0f / x; }

}  // namespace phalanx::ptx
