// Arguments of the BF16 products, and how their operands lie.
#pragma once

#include "device/gemm/config.h"
#include "device/gemm/groups.h"
#include "phalanx/gemm_bf16.h"

namespace phalanx {

/// The last two dimensions exchanged.
Tensor transposed(const Tensor& x);

/// Along what a matrix, or each of a stack, is contiguous, with other strides that suit TMA: K, its last dimension, if
/// both are.
Major major_of(const Tensor& x);

void check_gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& d, const GemmOptions& options);

/// `groups`: int32 [G + 1], [M] or [G], as `by` says.
void check_grouped_gemm_bf16(const char* op, GroupsBy by, const Tensor& a, const Tensor& b, const Tensor& groups,
                             const Tensor& d, const GroupedGemmOptions& options);

void check_grouped_wgrad_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                              const WgradOptions& options);

}  // namespace phalanx
