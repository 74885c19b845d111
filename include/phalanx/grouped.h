// Products of many groups at once: the experts of a mixture-of-experts layer. How many rows each group has is known on
// the device alone; nothing here waits for it.
#pragma once

#include <limits>
#include <optional>

#include "phalanx/export.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx {

/// The most groups of one call.
inline constexpr int kMaxGroups = 512;

struct GroupedGemmOptions {
  Stream stream{};
  int num_sms = 0;        ///< SMs that the kernel may use, as in GemmOptions; 0 means all
  int expected_rows = 0;  ///< of a group: how the kernel is chosen, never what it computes; 0 means unknown
  /// A row's result depends on that row and its group's B alone, to the bit. So it always is on CUDA; the CPU takes
  /// longer for it.
  bool batch_invariant = false;
};

// B is a stack [G, N, K] with scales [G, ceil(N / 128), ceil(K / 128)], 1 <= G <= kMaxGroups. The rows of A, B and D
// are contiguous; row strides are multiples of 16 bytes, bases 16-byte aligned. The matrices of a stack are a whole
// number of its rows apart. Scales have any strides. On CUDA, and with `batch_invariant` on the CPU, a row's result
// does not depend on the number of rows, their order, or the chosen kernel.
//
// Groups that contradict themselves: on the CPU they throw at once. On CUDA the kernel clamps them to what lies inside
// the matrices, the call returns, and the next grouped call on that device throws Error invalid_argument;
// `check_groups` does so on request. Where there are no rows there is no kernel, and nobody looks.

/// Row i of D = row i of A · B[g]ᵀ, for offsets[g] <= i < offsets[g + 1]. Groups may be of any size, empty ones
/// included. Rows of D below offsets[0] and from offsets[G] on are not written, nor are those of A used.
///
/// @param a        data E4M3 [M, K]; scales FP32 [M, ceil(K / 128)], any strides, best MN-major
/// @param b        data E4M3 [G, N, K]; scales FP32 [G, ceil(N / 128), ceil(K / 128)]
/// @param offsets  int32 [G + 1], contiguous, on the device: 0 <= offsets[0] <= ... <= offsets[G] <= M
/// @param d        BF16 or FP32 [M, N], overlapping no input
/// @throws Error before anything is written
PHALANX_API void grouped_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                                  const GroupedGemmOptions& options = {});

/// The same, where row i belongs to group row_groups[i], or to none if that is -1. The rows of one group lie together,
/// with no others, nor -1, between; groups may come in any order. A group in several pieces is left out and reported.
///
/// @param row_groups  int32 [M], contiguous, on the device: -1 <= row_groups[i] < G
PHALANX_API void grouped_gemm_fp8_indexed(const ScaledTensor& a, const ScaledTensor& b, const Tensor& row_groups,
                                          const Tensor& d, const GroupedGemmOptions& options = {});

/// D[g] = A[g] · B[g]ᵀ, the first counts[g] rows only. The others are not written, nor used.
///
/// @param a       data E4M3 [G, R, K], any R; scales FP32 [G, R, ceil(K / 128)], any strides, best MN-major in each
/// group
/// @param counts  int32 [G], contiguous, on the device: 0 <= counts[g] <= R
/// @param d       BF16 or FP32 [G, R, N]
PHALANX_API void grouped_gemm_fp8_masked(const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts,
                                         const Tensor& d, const GroupedGemmOptions& options = {});

struct GroupedSwigluOptions {
  float limit = std::numeric_limits<float>::infinity();  ///< as in SwigluOptions, as are the next two
  std::optional<Tensor> weights{};                       ///< FP32 [M], any stride
  bool pow2_scales = false;
  /// BF16 [M, 2 I], room for gates and ups, as a D of `grouped_gemm_fp8`: with it two kernels do the work where they
  /// are quicker. What it holds afterwards is of no use.
  std::optional<Tensor> gates_and_ups{};
  Stream stream{};
  int num_sms = 0;               ///< as in GroupedGemmOptions, but two are used at the least
  int expected_rows = 0;         ///< as in GroupedGemmOptions
  bool batch_invariant = false;  ///< as in GroupedGemmOptions
};

/// q = SwiGLU of A · B[g]ᵀ: the bytes of `grouped_gemm_fp8` to BF16 followed by `swiglu_quantize`, without what lies
/// between.
///
/// @param b        data E4M3 [G, 2 I, K], I gates and then as many ups, I a multiple of 128; scales [G, 2 I / 128,
/// ceil(K / 128)]
/// @param offsets  as in `grouped_gemm_fp8`
/// @param q        data E4M3 [M, I], rows as of an operand of a product; scales FP32 [M, I / 128], any strides, best
/// MN-major;
///                 overlapping no input. What rows of no group hold afterwards is undefined
/// @throws Error before anything is written
PHALANX_API void grouped_gemm_fp8_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets,
                                         const ScaledTensor& q, const GroupedSwigluOptions& options = {});

struct WgradOptions {
  bool accumulate = false;  ///< add to what D holds
  Stream stream{};
  int num_sms = 0;
};

/// D (+)= A · Bᵀ where both have a scale per 1 x 128: the gradient of a weight from transposed gradients and
/// activations, K being tokens.
///
/// @param a  data E4M3 [M, K]; scales FP32 [M, ceil(K / 128)], any strides, best MN-major
/// @param b  data E4M3 [N, K]; scales FP32 [N, ceil(K / 128)], the same
/// @param d  FP32 [M, N], overlapping no input
///
/// M, N >= 1, K >= 0. Rows, strides and errors as in `gemm_fp8`.
PHALANX_API void wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d,
                           const WgradOptions& options = {});

/// D[g] (+)= A · Bᵀ over the columns offsets[g] <= k < offsets[g + 1] of both: one gradient for each expert, from all
/// tokens in the order of their experts. Groups begin and end anywhere; the scales' blocks of 128 columns count from
/// column 0 whatever the groups, so a block may serve two. Without `accumulate`, D[g] of an empty group becomes zero.
///
/// @param a, b     as in `wgrad_fp8`
/// @param offsets  int32 [G + 1], contiguous, on the device: 0 <= offsets[0] <= ... <= offsets[G] <= K
/// @param d        FP32 [G, M, N]
PHALANX_API void grouped_wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                                   const WgradOptions& options = {});

/// Throws what a kernel has found wrong with the groups of an earlier call on this device, once. Does not wait:
/// synchronise first to hear of everything enqueued so far. Always quiet for the CPU.
PHALANX_API void check_groups(Device device);

}  // namespace phalanx
