// What the host passes to the kernels that move tokens to experts and back. Strides are in bytes, of scales in
// elements.
#pragma once
#include "device/divisor.h"
#include "device/moe/route.h"
#include "device/quantize/params.h"
#include "device/types.h"

namespace phalanx {

struct RouteParams {
  const void* topk_idx;  // [num_tokens, topk], int32 or int64
  i64 topk_idx_stride;   // in elements
  int topk_idx_is_64;
  int num_tokens, topk, num_experts;
  Divisor by_topk;
  RouteTarget target;
  int* counts;   // [num_experts]
  int* offsets;  // [num_experts + 1]
  int* slots;    // [num_tokens, topk]
  int* sources;  // [target.num_rows]
  int* needed;   // [1]

  constexpr int num_entries() const { return num_tokens * topk; }
};

// Rows in expert order, of which those with a negative source are padding.
struct ExpertRows {
  u8* data;
  i64 stride;
  const int* sources;  // [num_rows]
  int num_rows;
  int row_vectors;  // 16-byte vectors of a row
  Divisor groups;   // of those, that are cleared by one CTA
  int zero_padding;
  int first_cta, num_ctas;  // that see to padding rows, and to scales
};

struct PermuteParams {
  const u8* x;
  i64 x_stride;
  ExpertRows rows;
  const int* slots;
  int num_tokens, topk;
  Divisor pieces;  // of a token, each a CTA's
  Divisor by_topk;
  // Scales, one column for each 128 columns of data; num_scales is 0 where there are none.
  const float* x_scales = nullptr;
  float* scales = nullptr;
  i64 x_scale_stride_row = 0, x_scale_stride_col = 0;
  i64 scale_stride_expert = 0, scale_stride_row = 0, scale_stride_col = 0;
  int num_scales = 0;
  Divisor rows_per_expert = {};  // of a contiguous target all rows
};

struct RouteAndPermuteParams {
  RouteParams route;
  PermuteParams permute;
  ScaledMatrix q;  // [num_tokens, H], where x is BF16 and quantised on the way
};

struct UnpermuteParams {
  const u8* rows;
  i64 rows_stride;
  const int* slots;
  const float* weights;  // [num_tokens, topk] or null
  i64 weights_stride;    // in elements
  const u8* residual;    // or null
  u8* out;
  i64 residual_stride, out_stride;
  int num_tokens, topk, row_vectors;
  Divisor pieces;  // of a token, each a CTA's
};

struct UnpermuteBackwardParams {
  const u8* grad_out;
  i64 grad_out_stride;
  const u8* rows;  // what was un-permuted; null where grad_weights is
  i64 rows_stride;
  const int* slots;
  const float* weights;  // or null
  i64 weights_stride;    // in elements
  ExpertRows grad_rows;
  float* grad_weights;  // [num_tokens, topk] or null
  int num_tokens, topk;
};

}  // namespace phalanx
