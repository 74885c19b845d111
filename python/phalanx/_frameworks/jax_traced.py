"""JAX inside jax.jit: operations as custom calls, which XLA makes with its own buffers, in its own stream.

jax-tvm-ffi brings them from XLA to the functions below, which are called whenever a compiled function runs (Python's
lock is taken for it: some 10 us). What is wrong with operands is found then, before anything is enqueued, and XLA wraps
it in a JaxRuntimeError.

XLA knows no strides: scales that are best MN-major travel as their transpose, which costs nothing between a
quantisation and a product of the same function.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import tvm_ffi

from phalanx import _native
from phalanx._frameworks.base import check_untraced, dtype_of, matrix_shape, num_blocks


def _transposed(array):
    """A view of a tensor that XLA handed over: rows become columns."""
    rows, cols = array.shape
    return _native.view(array.data_ptr(), array.dtype, (cols, rows), (1, cols), array.device)


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


_OPTIONS = {
    _gemm_fp8: ("num_sms", "batch_invariant", "constant_b"),
    _quantize: ("blocks", "pow2_scales"),
    _quantize_transposed: ("pow2_scales",),
    _quantize_both: ("pow2_scales",),
    _dequantize: ("by_rows",),
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
    attributes = {name: np.int64(value) for name, value in zip(_OPTIONS[function], options, strict=True)}
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


def quantize_transposed(x, pow2_scales):
    rows, cols = matrix_shape("x", x)
    data, scales = _call(_quantize_transposed, (x,), _new_quantized(cols, rows), (pow2_scales,))
    return data, scales.T


def quantize_both(x, pow2_scales):
    rows, cols = matrix_shape("x", x)
    results = *_new_quantized(rows, cols), *_new_quantized(cols, rows)
    data, scales, data_t, scales_t = _call(_quantize_both, (x,), results, (pow2_scales,))
    return data, scales.T, data_t, scales_t.T


def dequantize(data, scales, out, dtype):
    check_untraced(out)
    rows, cols = matrix_shape("q.data", data)
    by_rows = matrix_shape("q.scales", scales)[0] == rows
    result = jax.ShapeDtypeStruct((rows, cols), jnp.float32 if dtype is None else dtype)
    return _call(_dequantize, (data, scales.T if by_rows else scales), result, (by_rows,))
