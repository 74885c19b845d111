// The operations that device/quantize/swiglu.h asks for.
#pragma once
#include "device/ptx/arithmetic.cuh"

namespace phalanx {

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

}  // namespace phalanx
