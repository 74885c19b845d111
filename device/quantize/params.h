// What the host passes to a quantisation kernel at run time. Strides are in elements.
#pragma once
#include "device/types.h"

namespace phalanx {

struct QuantizeParams {
  void* x;  // [rows, cols], BF16, FP16 or FP32: input of quantize, output of dequantize
  u8* q;    // [rows, cols], E4M3
  float* scales;
  i64 x_stride, q_stride, scale_stride_row, scale_stride_col;
  int rows, cols;
  int pow2_scales;
};

}  // namespace phalanx
