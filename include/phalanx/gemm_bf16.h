// BF16 matrix products: those of the FP8 ones, without scales. What training keeps in BF16, and what quantised layers
// are compared with.
#pragma once

#include "phalanx/export.h"
#include "phalanx/gemm.h"
#include "phalanx/grouped.h"
#include "phalanx/tensor.h"

namespace phalanx {

/// D = A · Bᵀ (+ C), summed in FP32 and rounded once.
///
/// @param a  BF16 [M, K], contiguous along K or along M (the transposed view of a row-major [K, M])
/// @param b  BF16 [N, K], contiguous along K or along N
/// @param d  BF16 or FP32 [M, N], rows contiguous, overlapping no input but C
///
/// M >= 0, N >= 1, K >= 1. The other strides are multiples of 16 bytes and bases 16-byte aligned. On CUDA the work is
/// enqueued on `options.stream`; a warm call neither allocates, compiles nor synchronises. The same input gives the
/// same bits.
///
/// @throws Error before anything is written
PHALANX_API void gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& d, const GemmOptions& options = {});

// Of groups, as in grouped.h: sizes that the device alone knows, and that are clamped and reported where they
// contradict themselves. 1 <= G <= kMaxGroups. On CUDA a row's result depends on that row and its group's B alone, to
// the bit.

/// Row i of D = row i of A · B[g]ᵀ, for offsets[g] <= i < offsets[g + 1]; other rows are neither used nor written.
///
/// @param a        BF16 [M, K], rows contiguous
/// @param b        BF16 [G, N, K], each matrix contiguous along K or along N, a whole number of such lines apart
/// @param offsets  int32 [G + 1], contiguous, on the device: 0 <= offsets[0] <= ... <= offsets[G] <= M
/// @param d        BF16 or FP32 [M, N], overlapping no input
/// @throws Error before anything is written
PHALANX_API void grouped_gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                                   const GroupedGemmOptions& options = {});

/// The same, where row i belongs to group row_groups[i], or to none if that is -1; the rows of one group lie together.
///
/// @param row_groups  int32 [M], contiguous, on the device: -1 <= row_groups[i] < G
PHALANX_API void grouped_gemm_bf16_indexed(const Tensor& a, const Tensor& b, const Tensor& row_groups, const Tensor& d,
                                           const GroupedGemmOptions& options = {});

/// D[g] = A[g] · B[g]ᵀ, the first counts[g] rows only. The others are not written, nor used.
///
/// @param a       BF16 [G, R, K], any R
/// @param counts  int32 [G], contiguous, on the device: 0 <= counts[g] <= R
/// @param d       BF16 or FP32 [G, R, N]
PHALANX_API void grouped_gemm_bf16_masked(const Tensor& a, const Tensor& b, const Tensor& counts, const Tensor& d,
                                          const GroupedGemmOptions& options = {});

/// D[g] (+)= A[rows of g]ᵀ · B[rows of g], rows offsets[g] <= i < offsets[g + 1]: the gradients of the experts'
/// weights, from gradients and activations as they lie. Without `accumulate`, D[g] of an empty group becomes zero. Of
/// one product, `gemm_bf16` of transposed views is the same.
///
/// @param a        BF16 [T, M], rows contiguous
/// @param b        BF16 [T, N], rows contiguous
/// @param offsets  int32 [G + 1], contiguous, on the device: 0 <= offsets[0] <= ... <= offsets[G] <= T
/// @param d        FP32 [G, M, N], overlapping no input
///
/// M, N >= 1, T >= 0.
PHALANX_API void grouped_wgrad_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                                    const WgradOptions& options = {});

}  // namespace phalanx
