"""SwiGLU between two FP8 products."""

import math
from typing import Any

from phalanx import _frameworks
from phalanx._api import Quantized, as_pair
from phalanx._frameworks.base import Framework, check_untraced, matrix_shape


def swiglu_quantize(x, weights=None, limit=None, interleaved=False, pow2_scales=False, out=None):
    """silu(gate) * up * weights in FP32, then E4M3 with one FP32 scale per 1 x 128: what the next product reads.

    x:            [M, 2 I] BF16, FP16 or FP32, gate and up, rows contiguous, any row stride
    weights:      FP32 [M], one for each row, as routing gives them; 1 without it
    limit:        a number above 0: gate is cut to at most this, up to at most this in magnitude
    interleaved:  False: x is [gate | up]. True: 8 columns of gate and 8 of up in turn; I is a multiple of 8
    pow2_scales:  round scales up to powers of two
    out:          Quantized or (data, scales) to write: data [M, I], scales [M, ceil(I / 128)]; without it new
                  arrays, laid out as those of `quantize`

    CPU and CUDA give the same bytes; docs/numerics.md defines them. The result carries no gradient: see
    `swiglu_backward`.

    Raises ValueError or TypeError that names the argument, before anything is written; else as `gemm_fp8`.
    """
    framework = _frameworks.of(x, "x")
    if out is not None:
        out = as_pair(out=out)
    options = as_limit(limit), interleaved, pow2_scales
    if framework.is_traced(x):
        check_untraced(out)
        return Quantized(*framework.traced("swiglu_quantize", (x, weights), None, (), options))
    if out is None:
        out = empty_activation(framework, x)
    else:
        framework.check_out(out, None)
    data, scales = out
    arguments = (
        framework.view(x),
        None if weights is None else framework.view(weights),
        framework.writable_view(data),
        framework.writable_view(scales),
        *options,
    )
    return Quantized(*framework.run("swiglu_quantize", arguments, x, (data, scales)))


def swiglu_backward(grad, x, weights=None, limit=None, interleaved=False, out=None):
    """The gradients of `swiglu_quantize`'s inputs, given that of what it quantises: (grad_x, grad_weights).

    grad:  [M, I] of x's dtype
    out:   grad_x to write, [M, 2 I] of x's dtype; may be `x` itself. Without it a new array

    grad_x is laid out as x and rounded once to its dtype: the same bits on CPU and CUDA. grad_weights is FP32 [M], or
    None without weights. The other arguments are those of `swiglu_quantize`.

    Raises ValueError or TypeError that names the argument, before anything is written; else as `gemm_fp8`.
    """
    framework = _frameworks.of(x, "x")
    options = as_limit(limit), interleaved
    if framework.is_traced(x):
        check_untraced(out)
        grad_x, grad_weights = framework.traced("swiglu_backward", (grad, x, weights), None, (), options)
        return grad_x, None if weights is None else grad_weights
    grad_x, grad_weights = empty_gradients(framework, x, weights, out)
    arguments = (
        framework.view(x),
        framework.view(grad),
        None if weights is None else framework.view(weights),
        framework.writable_view(grad_x),
        None if weights is None else framework.writable_view(grad_weights),
        *options,
    )
    return framework.run("swiglu_backward", arguments, x, (grad_x, grad_weights))


def swiglu_quantize_both(x, weights=None, limit=None, interleaved=False, pow2_scales=False):
    """`swiglu_quantize`, and in the same pass `quantize_transposed` of what it quantises: E4M3 [M, I] and [I, M].

    x is BF16. The second is what the gradient of the next product's weights needs.
    """
    framework = _frameworks.of(x, "x")
    return _both(framework, "swiglu_quantize_both", (x, weights), (as_limit(limit), interleaved, pow2_scales))


def swiglu_backward_both(grad, x, weights=None, limit=None, interleaved=False, pow2_scales=False):
    """`quantize_both` of `swiglu_backward`'s grad_x, in one pass: E4M3 [M, 2 I] and [2 I, M].

    x and grad are BF16, I is a multiple of 8.
    """
    framework = _frameworks.of(x, "x")
    return _both(framework, "swiglu_backward_both", (x, grad, weights), (as_limit(limit), interleaved, pow2_scales))


def _both(framework: Framework, name: str, operands: tuple, options: tuple) -> tuple[Quantized, Quantized]:
    """`operands` as the compiled function takes them: x first."""
    x = operands[0]
    if framework.is_traced(x):
        out = framework.traced(name, operands, None, (), options)
    else:
        out = empty_both(framework, name, x)
        views = [None if array is None else framework.view(array) for array in operands]
        out_views = map(framework.writable_view, out)
        out = framework.run(name, (*views, *out_views, *options), x, out)
    return Quantized(*out[:2]), Quantized(*out[2:])


def empty_both(framework: Framework, name: str, x: Any) -> tuple[Any, Any, Any, Any]:
    rows, cols = matrix_shape("x", x)
    return framework.empty_quantized_both(rows, cols // 2 if name == "swiglu_quantize_both" else cols, x)


def empty_activation(framework: Framework, x: Any) -> tuple[Any, Any]:
    rows, cols = matrix_shape("x", x)
    return framework.empty_quantized(rows, cols // 2, False, x)


def empty_gradients(framework: Framework, x: Any, weights: Any, out: Any = None) -> tuple[Any, Any]:
    """Those of x and of the weights, if there are any."""
    rows, cols = matrix_shape("x", x)
    if out is None:
        grad_x = framework.empty_rows(rows, cols, x.dtype, x)
    else:
        framework.check_out(out, x.dtype)
        grad_x = out
    return grad_x, None if weights is None else framework.empty((rows,), (1,), framework.f32, x)


def as_limit(limit: float | None) -> float:
    try:
        return math.inf if limit is None else float(limit)
    except (TypeError, ValueError):
        raise TypeError(f"limit: {limit!r}; expected a number or None") from None
