// What the host passes to the product of gates and ups beside what every product takes.
#pragma once
#include "device/gemm/params.h"
#include "device/quantize/params.h"

namespace phalanx {

struct GemmSwigluParams {
  GemmParams gemm;       // n: of gates and ups; no C, no D
  ScaledMatrix q;        // [m, n / 2]
  const float* weights;  // of rows; null: 1
  i64 weight_stride;
  float limit;  // of gate and up; infinity: none
  int pow2_scales;
};

}  // namespace phalanx
