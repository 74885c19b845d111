// The CPU backend: the same operations on host memory. Arguments have been checked by src/ops.
#pragma once

#include "device/quantize/config.h"
#include "phalanx/activation.h"
#include "phalanx/gemm.h"
#include "phalanx/grouped.h"
#include "phalanx/quantize.h"

namespace phalanx::cpu {

void gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const Tensor* c,
              bool batch_invariant = false);

void grouped_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                      bool batch_invariant = false);
void grouped_gemm_fp8_indexed(const ScaledTensor& a, const ScaledTensor& b, const Tensor& row_groups, const Tensor& d,
                              bool batch_invariant = false);
void grouped_gemm_fp8_masked(const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts, const Tensor& d,
                             bool batch_invariant = false);
void grouped_gemm_fp8_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const ScaledTensor& q,
                             const GroupedSwigluOptions& options);
void wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, bool accumulate);
void grouped_wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                       bool accumulate);

void quantize(const Tensor& x, const ScaledTensor& q, ScaleShape shape, bool pow2_scales);
void quantize_transposed(const Tensor& x, const ScaledTensor& q, bool pow2_scales);
void dequantize(const ScaledTensor& q, const Tensor& x, ScaleShape shape);

void swiglu_quantize(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options);
void swiglu_quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                          const SwigluOptions& options);
void swiglu_backward_both(const Tensor& x, const Tensor& grad, const ScaledTensor& q, const ScaledTensor& q_t,
                          const SwigluOptions& options);
/// `grad_weights`: null if not wanted.
void swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x, const Tensor* grad_weights,
                     const SwigluOptions& options);

}  // namespace phalanx::cpu
