"""JAX inside jax.jit: operations as custom calls, which XLA makes with its own buffers, in its own stream.

jax-tvm-ffi brings them from XLA to the functions below, which are called whenever a compiled function runs (Python's
lock is taken for it: some 10 us). What is wrong with operands is found then, before anything is enqueued, and JAX
raises it as an error of its own, JaxRuntimeError as a rule, with the text.

XLA knows no strides: scales that are best MN-major travel as their transpose, which costs nothing between a
quantisation and a product of the same function.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import tvm_ffi

from phalanx import _native
from phalanx._frameworks.base import check_untraced, dtype_of, matrix_shape, num_blocks, shape_of


def _transposed(array):
    """A view of a matrix, or a stack of them, that XLA handed over: rows become columns."""
    *stack, rows, cols = array.shape
    strides = (*(rows * cols for _ in stack), 1, cols)
    return _native.view(array.data_ptr(), array.dtype, (*stack, cols, rows), strides, array.device)


# --- what XLA calls: the options, then operands and results ---------------------------------------------------------


def _gemm_fp8(num_sms, batch_invariant, constant_b, a, sfa, b, sfb, *c_and_d):
    *c, d = c_and_d
    options = num_sms, bool(batch_invariant), bool(constant_b)
    _native.gemm_fp8(a, _transposed(sfa), b, sfb, d, c[0] if c else None, *options, None)


def _quantize(blocks, pow2_scales, x, data, scales):
    _native.quantize(x, data, scales if blocks else _transposed(scales), bool(blocks), bool(pow2_scales), None)


def _quantize_transposed(pow2_scales, x, data, scales):
    _native.quantize_transposed(x, data, _transposed(scales), bool(pow2_scales), None)


def _quantize_both(pow2_scales, x, data, scales, data_t, scales_t):
    _native.quantize_both(x, data, _transposed(scales), data_t, _transposed(scales_t), bool(pow2_scales), None)


def _dequantize(by_rows, data, scales, out):
    _native.dequantize(data, _transposed(scales) if by_rows else scales, out, None)


def _swiglu_quantize(limit, interleaved, pow2_scales, x, *weights_and_results):
    *weights, data, scales = weights_and_results
    options = limit, bool(interleaved), bool(pow2_scales)
    _native.swiglu_quantize(x, weights[0] if weights else None, data, _transposed(scales), *options, None)


def _grouped(name):
    def call(num_sms, expected_rows, batch_invariant, a, sfa, b, sfb, groups, d):
        options = num_sms, expected_rows, bool(batch_invariant)
        getattr(_native, name)(a, _transposed(sfa), b, sfb, groups, d, *options, None)

    call.__name__ = name
    return call


_GROUPED = {
    name: _grouped(name) for name in ("grouped_gemm_fp8", "grouped_gemm_fp8_indexed", "grouped_gemm_fp8_masked")
}

_OPTIONS = {
    _gemm_fp8: ("num_sms", "batch_invariant", "constant_b"),
    _quantize: ("blocks", "pow2_scales"),
    _quantize_transposed: ("pow2_scales",),
    _quantize_both: ("pow2_scales",),
    _dequantize: ("by_rows",),
    _swiglu_quantize: ("limit", "interleaved", "pow2_scales"),
    **dict.fromkeys(_GROUPED.values(), ("num_sms", "expected_rows", "batch_invariant")),
}


@cache
def _target(function) -> str:
    """The name under which XLA knows it."""
    try:
        import jax_tvm_ffi
    except ImportError:
        raise ImportError("phalanx inside jax.jit needs jax-tvm-ffi: pip install jax-tvm-ffi") from None
    name = f"phalanx.{function.__name__.strip('_')}"
    spec = [*(f"attrs.{option}" for option in _OPTIONS[function]), "args", "rets"]
    for platform in ("cpu", "gpu"):
        jax_tvm_ffi.register_ffi_target(name, tvm_ffi.convert(function), spec, platform=platform)
    return name


def _call(function, operands, results, options):
    attributes = {
        name: (np.float64 if isinstance(value, float) else np.int64)(value)
        for name, value in zip(_OPTIONS[function], options, strict=True)
    }
    return jax.ffi.ffi_call(_target(function), results)(*operands, **attributes)


def _new_quantized(rows, cols, blocks=False):
    scales = (num_blocks(rows), num_blocks(cols)) if blocks else (num_blocks(cols), rows)
    data = jax.ShapeDtypeStruct((rows, cols), jnp.float8_e4m3fn)
    return data, jax.ShapeDtypeStruct(scales, jnp.float32)


# --- what the framework calls -----------------------------------------------------------------------------------------


def gemm_fp8(a, sfa, b, sfb, c, out, out_dtype, num_sms, batch_invariant, constant_b):
    check_untraced(out)
    if out_dtype is None:
        out_dtype = jnp.bfloat16 if c is None else dtype_of("c", c)
    (m, _), (n, _) = matrix_shape("a.data", a), matrix_shape("b.data", b)
    matrix_shape("a.scales", sfa)
    operands = (a, sfa.T, b, sfb) if c is None else (a, sfa.T, b, sfb, c)
    return _call(_gemm_fp8, operands, jax.ShapeDtypeStruct((m, n), out_dtype), (num_sms, batch_invariant, constant_b))


def quantize(x, blocks, pow2_scales, out):
    check_untraced(out)
    data, scales = _call(_quantize, (x,), _new_quantized(*matrix_shape("x", x), blocks), (blocks, pow2_scales))
    return data, scales if blocks else scales.T


def dequantize(data, scales, out, dtype):
    check_untraced(out)
    rows, cols = matrix_shape("q.data", data)
    by_rows = matrix_shape("q.scales", scales)[0] == rows
    result = jax.ShapeDtypeStruct((rows, cols), jnp.float32 if dtype is None else dtype)
    return _call(_dequantize, (data, scales.T if by_rows else scales), result, (by_rows,))


def traced(name, operands, out, new, options):
    """Those of the operations that ask first whether they are traced."""
    check_untraced(out)
    if name in _GROUPED:
        return _call_grouped(_GROUPED[name], *operands, *new, options)
    one = {
        "quantize_transposed": _call_quantize_transposed,
        "quantize_both": _call_quantize_both,
        "swiglu_quantize": _call_swiglu_quantize,
    }.get(name)
    if one is None:
        raise TypeError(f"{name} cannot be traced by jax.jit, grad or vmap yet: call it outside")
    return one(*operands, options)


def _call_quantize_transposed(x, options):
    rows, cols = matrix_shape("x", x)
    data, scales = _call(_quantize_transposed, (x,), _new_quantized(cols, rows), options)
    return data, scales.T


def _call_quantize_both(x, options):
    rows, cols = matrix_shape("x", x)
    results = *_new_quantized(rows, cols), *_new_quantized(cols, rows)
    data, scales, data_t, scales_t = _call(_quantize_both, (x,), results, options)
    return data, scales.T, data_t, scales_t.T


def _call_swiglu_quantize(x, weights, options):
    rows, cols = matrix_shape("x", x)
    operands = (x,) if weights is None else (x, weights)
    data, scales = _call(_swiglu_quantize, operands, _new_quantized(rows, cols // 2), options)
    return data, scales.T


def _call_grouped(function, a, sfa, b, sfb, groups, out_dtype, options):
    shapes = {name: shape_of(name, array) for name, array in (("a.data", a), ("a.scales", sfa), ("b.data", b))}
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"{name}: shape {shape}; expected a matrix, or a stack of them")
    result = jax.ShapeDtypeStruct((*a.shape[:-1], b.shape[-2]), jnp.bfloat16 if out_dtype is None else out_dtype)
    return _call(function, (a, jnp.swapaxes(sfa, -1, -2), b, sfb, groups), result, options)
