// Argument checks of the public operations. All throw Error before anything is written; the message names the
// operation, the argument, what it is and what was expected. When all is well they allocate and format nothing: a warm
// call can afford them.
#pragma once

#include <cstdint>
#include <string>

#include "device/gemm/groups.h"
#include "phalanx/gemm.h"
#include "phalanx/grouped.h"

namespace phalanx {

/// "cpu", "cuda:0"
std::string to_string(const Device& device);

/// Elements from one row of a checked matrix to the next. A matrix of one row may carry any stride: it gets the
/// smallest that keeps the 16-byte rule.
inline std::int64_t row_stride(const Tensor& matrix) {
  const std::int64_t unit = 16 / size_of(matrix.dtype);
  return matrix.rows() > 1 ? matrix.strides[0] : (matrix.cols() + unit - 1) / unit * unit;
}

/// The same rules on CPU and CUDA, whether a tensor lies in either.
void check_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const GemmOptions& options);

/// `groups`: int32 [G + 1], [M] or [G], as `by` says.
void check_grouped_gemm(const char* op, GroupsBy by, const ScaledTensor& a, const ScaledTensor& b, const Tensor& groups,
                        const Tensor& d, const GroupedGemmOptions& options);

void check_grouped_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const ScaledTensor& q,
                          const GroupedSwigluOptions& options);

/// `offsets`: null without groups.
void check_wgrad(const char* op, const ScaledTensor& a, const ScaledTensor& b, const Tensor* offsets, const Tensor& d,
                 const WgradOptions& options);

}  // namespace phalanx
