// What the host passes to the kernels of this room at run time. Strides are in elements. `vectors`: bases, strides and
// columns are such that every 16-byte piece of x, and what it becomes in q, lies wholly inside and is aligned to its
// size.
#pragma once
#include "device/types.h"

namespace phalanx {

// E4M3 with a scale per block.
struct ScaledMatrix {
  u8* data;
  i64 stride;  // of its rows
  float* scales;
  i64 scale_stride_row, scale_stride_col;
};

struct QuantizeParams {
  const void* x;  // [rows, cols], BF16, FP16 or FP32
  i64 x_stride;
  ScaledMatrix q;    // [rows, cols], unless the form is `transposed`
  ScaledMatrix q_t;  // [cols, rows], if the form is `transposed` or `both`
  int rows, cols, rows_per_warp;
  int vectors, pow2_scales;
};

struct DequantizeParams {
  ScaledMatrix q;  // [rows, cols]
  void* x;         // [rows, cols], BF16, FP16 or FP32
  i64 x_stride;
  int rows, cols, rows_per_warp;
  int vectors;
};

struct SwigluParams {
  const void* x;  // [rows, 2 * cols], gate and up
  i64 x_stride;
  ScaledMatrix q;        // [rows, cols]
  ScaledMatrix q_t;      // [cols, rows]; swiglu_quantize_both only
  const float* weights;  // of rows; null: 1
  i64 weight_stride;
  int rows, cols, rows_per_warp;
  float limit;  // of gate and up; infinity: none
  int interleaved, vectors, pow2_scales;
};

struct SwigluBackwardParams {
  const void* x;  // [rows, 2 * cols], gate and up
  i64 x_stride;
  const void* grad;  // [rows, cols], of the result
  i64 grad_stride;
  void* grad_x;  // [rows, 2 * cols]
  i64 grad_x_stride;
  const float* weights;  // of rows; null: 1
  i64 weight_stride;
  float* grad_weights;  // null: not wanted
  i64 grad_weight_stride;
  int rows, cols, rows_per_cta;
  float limit;  // as above
  int interleaved, vectors;
};

struct SwigluBackwardBothParams {
  const void* x;  // [rows, 2 * cols], gate and up
  i64 x_stride;
  const void* grad;  // [rows, cols], of the result
  i64 grad_stride;
  ScaledMatrix q;        // [rows, 2 * cols], the gradient of x
  ScaledMatrix q_t;      // [2 * cols, rows], the same
  const float* weights;  // of rows; null: 1
  i64 weight_stride;
  int rows, cols;
  float limit;  // as above
  int interleaved, vectors, pow2_scales;
};

}  // namespace phalanx
