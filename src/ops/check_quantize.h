// Argument checks of quantisation and SwiGLU; as in check.h.
#pragma once

#include "device/quantize/config.h"
#include "phalanx/activation.h"
#include "phalanx/quantize.h"

namespace phalanx {

/// `q`, `q_t`: null where the form has none.
void check_quantize(QuantizeForm form, const Tensor& x, const ScaledTensor* q, const ScaledTensor* q_t);

/// Returns the shape of the blocks, which the scales' shape tells.
ScaleShape check_dequantize(const ScaledTensor& q, const Tensor& x);

void check_swiglu_quantize(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options);
void check_swiglu_quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                                const SwigluOptions& options);
void check_swiglu_backward_both(const Tensor& x, const Tensor& grad, const ScaledTensor& q, const ScaledTensor& q_t,
                                const SwigluOptions& options);
/// `grad_weights`: null if not wanted.
void check_swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x, const Tensor* grad_weights,
                           const SwigluOptions& options);

}  // namespace phalanx
