#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline u32 max_u16x2(u32 a, u32 b) { return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }
inline float min_nan(float a, float b) { return a != a ? a : b < a || b != b ? b : a; }
inline float max_nan(float a, float b) { return a != a ? a : b > a || b != b ? b : a; }
inline float rcp_approx_ftz(float x) { return 1.0f / x; }

}  // namespace phalanx::ptx
