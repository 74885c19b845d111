// The CPU backend: the same operations on host memory. Arguments have been checked by src/ops.
#pragma once

#include "device/quantize/config.h"
#include "phalanx/gemm.h"
#include "phalanx/quantize.h"

namespace phalanx::cpu {

void gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const Tensor* c,
              bool batch_invariant = false);

void grouped_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d);
void grouped_gemm_fp8_indexed(const ScaledTensor& a, const ScaledTensor& b, const Tensor& row_groups, const Tensor& d);
void grouped_gemm_fp8_masked(const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts, const Tensor& d);
void wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, bool accumulate);
void grouped_wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                       bool accumulate);

void quantize(const Tensor& x, const ScaledTensor& q, ScaleShape shape, bool pow2_scales);
void dequantize(const ScaledTensor& q, const Tensor& x, ScaleShape shape);

}  // namespace phalanx::cpu
