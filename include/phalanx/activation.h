// SwiGLU between two FP8 products: from what the gate-up product wrote to what the down product reads, and its
// gradients.
#pragma once

#include <limits>
#include <optional>

#include "phalanx/export.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx {

struct SwigluOptions {
  /// Columns of x: false, halves [gate | up]; true, 8 of gate and 8 of up in turn.
  bool interleaved = false;
  /// Above 0. gate is cut to at most this, up to at most this in magnitude.
  float limit = std::numeric_limits<float>::infinity();
  /// FP32 [M], any stride: what each row is multiplied with; 1 without it.
  std::optional<Tensor> weights{};
  bool pow2_scales = false;  ///< round scales up to powers of two
  Stream stream{};
};

/// q.data = round(h / q.scales) with h = silu(gate) * up * weight in FP32, one scale per 1 x 128 as quantize_rows makes
/// them.
///
/// docs/numerics.md defines every step; CPU and CUDA give the same bytes. A gate below -80 counts as -80.
///
/// @param x  BF16, FP16 or FP32 [M, 2 I], rows contiguous, any row stride; I a multiple of 8 if interleaved
/// @param q  data E4M3 [M, I], rows contiguous; scales FP32 [M, ceil(I / 128)], any strides, best MN-major
/// @throws Error before anything is written
PHALANX_API void swiglu_quantize(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options = {});

/// swiglu_quantize, and in the same pass quantize_transposed of h: q_t has data E4M3 [I, M] and scales FP32
/// [I, ceil(M / 128)], as the gradient of the next product's weights needs them. x is BF16.
PHALANX_API void swiglu_quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                                      const SwigluOptions& options = {});

/// The gradients of h's inputs, given that of h: grad_x, laid out as x and rounded once to its dtype, the same bits on
/// CPU and CUDA; and, if wanted, that of each weight, an FP32 sum in an order that does not change from call to call.
/// Gates and ups that `limit` has cut have a gradient of zero.
///
/// @param x             as above
/// @param grad          of x's dtype, [M, I], rows contiguous
/// @param grad_x        of x's dtype, [M, 2 I], rows contiguous
/// @param grad_weights  FP32 [M], any stride
/// @throws Error before anything is written
PHALANX_API void swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x,
                                 const std::optional<Tensor>& grad_weights = {}, const SwigluOptions& options = {});

/// swiglu_backward, and in the same pass quantize_both of grad_x as rounded to BF16, which is not written itself: q has
/// data E4M3 [M, 2 I], q_t [2 I, M]. x and grad are BF16, I is a multiple of 8; the weights have no gradient here.
PHALANX_API void swiglu_backward_both(const Tensor& x, const Tensor& grad, const ScaledTensor& q,
                                      const ScaledTensor& q_t, const SwigluOptions& options = {});

}  // namespace phalanx
