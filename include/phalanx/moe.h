// Tokens to their experts and back: the rows of a mixture-of-experts layer on one device, in the layouts that the
// grouped products read. How many rows each expert gets is known on the device alone; nothing here waits for it.
#pragma once

#include <optional>

#include "phalanx/export.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx {

/// Which row each choice of an expert takes: written by `route`, read by the others. int32, contiguous, on one device.
///
/// Rows are in order of expert, then token, then choice. A *contiguous* target lays the experts one after another; a
/// *masked* one gives each of them `max_rows` rows of its own, R = E * max_rows in all. A choice that finds no room has
/// no row.
struct Routing {
  Tensor counts;   ///< [E], rows of each expert
  Tensor offsets;  ///< [E + 1], where each expert's rows begin; contiguous: padding for `alignment` included, R at most
  Tensor slots;    ///< [T, K], the row of each choice; -1: none. Trusted: nothing checks that a row of one's own exists
  Tensor sources;  ///< [R], t * K + k for each row; -1: padding
  /// [1], the R, or, masked, the `max_rows`, that has room for all; with `alignment`, also for padding behind the last
  /// expert.
  Tensor needed;
};

struct RouteOptions {
  int alignment = 1;  ///< of a contiguous target: each expert's rows begin at a multiple of this
  int max_rows = 0;   ///< of each expert in a masked target; 0 makes it contiguous
  Stream stream{};
};

/// Gives every choice a row. Integers only; the same on CPU and CUDA.
///
/// @param topk_idx  int32 or int64 [T, K], rows contiguous, 0 <= K <= 32; outside [0, E), -1 say: no expert. Repeats
/// are choices
///                  like any other
/// @param routing   written; its shapes say E (1 to 1024) and R
/// @throws Error before anything is written
PHALANX_API void route(const Tensor& topk_idx, const Routing& routing, const RouteOptions& options = {});

/// rows[slots[t, k]] = x[t], byte by byte.
///
/// @param x             BF16 or FP32 [T, H], or data E4M3 [T, H] with scales FP32 [T, ceil(H / 128)], any strides, best
/// MN-major
/// @param rows          of x's dtype, [R, H]; masked also [E, max_rows, H], whose matrices follow each other without a
/// gap.
///                      Scales [R, ceil(H / 128)] or [E, max_rows, ceil(H / 128)], any strides
/// @param zero_padding  padding rows become zeros, with scales of 1; else they are left as they were
///
/// H is a multiple of 16 bytes, as are row strides; bases are 16-byte aligned.
/// @throws Error before anything is written
PHALANX_API void permute(const Tensor& x, const Routing& routing, const Tensor& rows, bool zero_padding = true,
                         Stream stream = {});
PHALANX_API void permute(const ScaledTensor& x, const Routing& routing, const ScaledTensor& rows,
                         bool zero_padding = true, Stream stream = {});

/// `route` and `permute`; for few tokens one kernel.
PHALANX_API void route_and_permute(const Tensor& x, const Tensor& topk_idx, const Routing& routing, const Tensor& rows,
                                   bool zero_padding = true, const RouteOptions& options = {});
PHALANX_API void route_and_permute(const ScaledTensor& x, const Tensor& topk_idx, const Routing& routing,
                                   const ScaledTensor& rows, bool zero_padding = true,
                                   const RouteOptions& options = {});

/// `quantize_rows` of x, into q, and `route_and_permute` of q; for few tokens in BF16 one kernel.
PHALANX_API void quantize_route_and_permute(const Tensor& x, const ScaledTensor& q, const Tensor& topk_idx,
                                            const Routing& routing, const ScaledTensor& rows, bool zero_padding = true,
                                            const RouteOptions& options = {});

struct UnpermuteOptions {
  std::optional<Tensor> weights;   ///< FP32 [T, K], rows contiguous; absent: 1
  std::optional<Tensor> residual;  ///< [T, H] of out's dtype, added last; may be `out` itself
  Stream stream{};
};

/// out[t] = sum over k of weights[t, k] * rows[slots[t, k]] (+ residual[t]); choices without a row add nothing.
///
/// In FP32, in the order of k; every product and every sum is rounded, and the last once more to out's dtype: the same
/// bits on CPU and CUDA. Without weights it is the gradient of `permute`.
///
/// @param rows  BF16 or FP32 [R, H] or [E, max_rows, H], strides as in `permute`
/// @param out   BF16 or FP32 [T, H]
/// @throws Error before anything is written
PHALANX_API void unpermute(const Tensor& rows, const Routing& routing, const Tensor& out,
                           const UnpermuteOptions& options = {});

struct UnpermuteBackwardOptions {
  std::optional<Tensor> weights;       ///< as in `unpermute`
  std::optional<Tensor> rows;          ///< as in `unpermute`, of grad_rows' dtype and shape: for grad_weights
  std::optional<Tensor> grad_weights;  ///< FP32 [T, K], contiguous, written; 0 for choices without a row. With `rows`
  bool zero_padding = true;            ///< padding rows of grad_rows become zeros; else they are left as they were
  Stream stream{};
};

/// grad_rows[slots[t, k]] = weights[t, k] * grad_out[t], rounded once to its dtype; grad_weights[t, k] = the dot
/// product of grad_out[t] and rows[slots[t, k]] in FP32, in an order of its own, always the same.
///
/// @param grad_out   BF16 or FP32 [T, H]
/// @param grad_rows  BF16 or FP32 [R, H] or [E, max_rows, H]
/// @throws Error before anything is written
PHALANX_API void unpermute_backward(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                                    const UnpermuteBackwardOptions& options = {});

}  // namespace phalanx
