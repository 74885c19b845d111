// FP8 matrix products with fine-grained scaling.
#pragma once

#include <optional>

#include "phalanx/export.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx {

struct GemmOptions {
  /// Added to the product; of D's shape, dtype and device. May be D itself, else disjoint from it.
  std::optional<Tensor> c;
  Stream stream{};
  /// SMs that the kernel may use, to leave room for others; 0 means all. With fewer, the stream's next kernel does not
  /// begin before this one ends, as it would take what is left.
  int num_sms = 0;
  /// A row of D depends, to the bit, on its row of A (and C) and on B alone: not on M, its place, the other rows or
  /// `num_sms`. Costs a little where few rows would have K split among SMs.
  bool batch_invariant = false;
  /// Nothing that may still be under way writes B, as of weights: an event or the host has waited for what did. (Kernels
  /// ahead in the stream may overlap, several of them.) With at most 16 rows, and all SMs to use, the first part of it is
  /// then read while they run, and K may be summed in other parts.
  bool constant_b = false;
};

/// D = A · Bᵀ (+ C), each 128-deep k-block accumulated by the tensor cores and promoted in FP32 with its scales.
///
/// @param a  data E4M3 [M, K]; scales FP32 [M, ceil(K / 128)], any strides (MN-major, as `quantize_rows` makes them, is
/// best)
/// @param b  data E4M3 [N, K]; scales FP32 [ceil(N / 128), ceil(K / 128)], any strides
/// @param d  BF16 or FP32 [M, N], overlapping no input but C
///
/// M >= 0, N >= 1, K >= 1. The rows of A, B, C and D are contiguous; their row strides are multiples of 16 bytes and
/// their bases 16-byte aligned (padded rows are fine, and neither N nor K need be a multiple of anything).
/// On CUDA the work is enqueued on `options.stream`; a warm call neither allocates, compiles nor synchronises.
/// The same input gives the same bits.
///
/// @throws Error before anything is written
PHALANX_API void gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d,
                          const GemmOptions& options = {});

}  // namespace phalanx
