// The BF16 products on host memory. Arguments have been checked by src/ops.
#pragma once

#include "phalanx/tensor.h"

namespace phalanx::cpu {

void gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& d, const Tensor* c, bool batch_invariant);

void grouped_gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d, bool batch_invariant);
void grouped_gemm_bf16_indexed(const Tensor& a, const Tensor& b, const Tensor& row_groups, const Tensor& d,
                               bool batch_invariant);
void grouped_gemm_bf16_masked(const Tensor& a, const Tensor& b, const Tensor& counts, const Tensor& d,
                              bool batch_invariant);
void grouped_wgrad_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d, bool accumulate);

}  // namespace phalanx::cpu
