// Arithmetic that CUDA C++ has no operator for.
#pragma once
#include "device/types.h"

namespace phalanx::ptx {

// Of each of the two halves.
__device__ __forceinline__ u32 add_u16x2(u32 a, u32 b) {
  u32 sum;
  asm("add.u16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ __forceinline__ u32 max_s16x2(u32 a, u32 b) {
  u32 larger;
  asm("max.s16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// NaN if either is.
__device__ __forceinline__ float min_nan(float a, float b) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// 1 / x to within one ulp.
__device__ __forceinline__ float rcp_approx_ftz(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

}  // namespace phalanx::ptx
