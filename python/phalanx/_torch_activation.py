"""Quantisation of transposes, and SwiGLU, as PyTorch operators; `phalanx.torch` imports this module.

    quantize_transposed(x, pow2_scales) -> (data, scales)
    quantize_both(x, pow2_scales) -> (data, scales, transposed data, transposed scales)
    swiglu_quantize(x, weights, limit, interleaved, pow2_scales) -> (data, scales)
    swiglu_backward(grad, x, weights, limit, interleaved) -> (grad_x, grad_weights)        without weights, empty
    swiglu_quantize_both(x, weights, limit, interleaved, pow2_scales) -> as quantize_both
    swiglu_backward_both(x, grad, weights, limit, interleaved, pow2_scales) -> as quantize_both

None has a gradient.
"""

import torch

from phalanx import _activation, _native
from phalanx._frameworks.base import matrix_shape
from phalanx._frameworks.torch import framework
from phalanx.torch import define_operator


def _empty_transposed(x, pow2_scales):
    return framework.empty_quantized(*reversed(matrix_shape("x", x)), False, x)


@define_operator("quantize_transposed(Tensor x, bool pow2_scales) -> (Tensor, Tensor)", _empty_transposed)
def _quantize_transposed(x, pow2_scales):
    out = _empty_transposed(x, pow2_scales)
    _native.quantize_transposed(x, *out, pow2_scales, None)
    return out


def _empty_both(x, pow2_scales):
    return framework.empty_quantized_both(*matrix_shape("x", x), x)


@define_operator("quantize_both(Tensor x, bool pow2_scales) -> (Tensor, Tensor, Tensor, Tensor)", _empty_both)
def _quantize_both(x, pow2_scales):
    out = _empty_both(x, pow2_scales)
    _native.quantize_both(x, *out, pow2_scales, None)
    return out


_SWIGLU = "float limit, bool interleaved"


def _empty_swiglu(x, weights, limit, interleaved, pow2_scales):
    return _activation.empty_activation(framework, x)


@define_operator(
    f"swiglu_quantize(Tensor x, Tensor? weights, {_SWIGLU}, bool pow2_scales) -> (Tensor, Tensor)", _empty_swiglu
)
def _swiglu_quantize(x, weights, limit, interleaved, pow2_scales):
    out = _activation.empty_activation(framework, x)
    _native.swiglu_quantize(x, weights, *out, limit, interleaved, pow2_scales, None)
    return out


def _empty_swiglu_gradients(grad, x, weights, limit, interleaved):
    grad_x, grad_weights = _activation.empty_gradients(framework, x, weights)
    return grad_x, x.new_empty(0, dtype=torch.float32) if weights is None else grad_weights


@define_operator(
    f"swiglu_backward(Tensor grad, Tensor x, Tensor? weights, {_SWIGLU}) -> (Tensor, Tensor)", _empty_swiglu_gradients
)
def _swiglu_backward(grad, x, weights, limit, interleaved):
    grad_x, grad_weights = _empty_swiglu_gradients(grad, x, weights, limit, interleaved)
    _native.swiglu_backward(
        x, grad, weights, grad_x, None if weights is None else grad_weights, limit, interleaved, None
    )
    return grad_x, grad_weights


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"


def _empty_activated_both(x, weights, limit, interleaved, pow2_scales):
    return _activation.empty_both(framework, "swiglu_quantize_both", x)


@define_operator(
    f"swiglu_quantize_both(Tensor x, Tensor? weights, {_SWIGLU}, bool pow2_scales) -> {_FOUR}", _empty_activated_both
)
def _swiglu_quantize_both(x, weights, *options):
    out = _empty_activated_both(x, weights, *options)
    _native.swiglu_quantize_both(x, weights, *out, *options, None)
    return out


def _empty_gradients_both(x, grad, weights, limit, interleaved, pow2_scales):
    return _activation.empty_both(framework, "swiglu_backward_both", x)


@define_operator(
    f"swiglu_backward_both(Tensor x, Tensor grad, Tensor? weights, {_SWIGLU}, bool pow2_scales) -> {_FOUR}",
    _empty_gradients_both,
)
def _swiglu_backward_both(x, grad, weights, *options):
    out = _empty_gradients_both(x, grad, weights, *options)
    _native.swiglu_backward_both(x, grad, weights, *out, *options, None)
    return out
