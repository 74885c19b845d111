"""The public functions. Each finds the array library of its first argument and leaves the call to it."""

from typing import Any, NamedTuple, NoReturn

from phalanx import _frameworks


class Quantized(NamedTuple):
    """An E4M3 matrix with one FP32 scale per block: value = data * scale. Any pair (data, scales) serves as well.

    data:    E4M3 [M, K], rows contiguous; NumPy: `ml_dtypes.float8_e4m3fn`; CuPy, which has no E4M3: the bytes as uint8
    scales:  FP32 [M, ceil(K / 128)] for 1 x 128 blocks, [ceil(M / 128), ceil(K / 128)] for 128 x 128
    """

    data: Any
    scales: Any


def gemm_fp8(a, b, c=None, out=None, out_dtype=None, num_sms=0, batch_invariant=False, constant_b=False):
    """D = A · Bᵀ (+ C), each 128-deep k-block accumulated by the tensor cores and promoted in FP32 with its scales.

    a:          Quantized or (data, scales): data E4M3 [M, K], scales FP32 [M, ceil(K / 128)], any strides; MN-major, as
                `quantize` makes them, is best
    b:          Quantized or (data, scales): data E4M3 [N, K], scales FP32 [ceil(N / 128), ceil(K / 128)]
    c:          [M, N] of the result's dtype, added to the product; may be `out` itself
    out:        [M, N] BF16 or FP32, written and returned. Without it a new array, whose row stride is padded to 16
                bytes where N is not a multiple of 8 (FP32: 4)
    out_dtype:  BF16 or FP32, as the array library names it; by default that of `out`, else of `c`, else BF16
    num_sms:    SMs that the kernel may use, to leave room for others; 0: all. With fewer, the stream's next kernel does
                not begin before this one ends, as it would take what is left
    batch_invariant:  a row of D depends, to the bit, on its row of A (and C) and on B alone: not on M, its place, the
                other rows or num_sms. Costs a little where few rows would have K split among SMs
    constant_b: nothing that may still be under way writes b, as of weights: an event or the host has waited for what
                did. (Kernels ahead in the stream may overlap, several of them.) With at most 16 rows, and all SMs to
                use, the first part of it is then read while they run, and K may be summed in other parts

    M >= 0, N >= 1, K >= 1; bases 16-byte aligned, row strides multiples of 16 bytes. Work is enqueued on the library's
    current stream; on the CPU, and with JAX, it is done on return. Same input, same bits. Not differentiable. Under
    torch.compile and torch.export the call becomes `torch.ops.phalanx.gemm_fp8`, under jax.jit, with the package
    jax-tvm-ffi, a custom call of XLA. JAX has no padded rows, so N and K must fit the 16-byte rule; no `out`.

    Raises, before anything is written: ValueError (shape, stride, alignment, device, aliasing), TypeError (dtype, or no
    array at all), UnsupportedError (no such GPU, driver or NVRTC), CompilationError, CudaError. Messages speak of `out`
    as `d`, the result.
    """
    try:
        (a_data, a_scales), (b_data, b_scales) = a, b
    except (TypeError, ValueError):
        raise_no_pair(a=a, b=b)
    # What `of` would find, without the call: this is the call that decoding waits for.
    framework = _frameworks.by_type.get(type(a_data)) or _frameworks.of(a_data, "a")
    return framework.gemm_fp8(
        a_data, a_scales, b_data, b_scales, c, out, out_dtype, num_sms, batch_invariant, constant_b
    )


def quantize(x, block=(1, 128), pow2_scales=False, out=None):
    """E4M3 data with one FP32 scale per block, amax / 448 of the block's finite elements.

    x:            [M, K] BF16, FP16 or FP32, rows contiguous, any row stride
    block:        (1, 128), the activations' format, or (128, 128), the weights'
    pow2_scales:  round scales up to powers of two
    out:          Quantized or (data, scales) to write; without it new arrays: data with rows padded to 16 bytes, scales
                  of 1 x 128 blocks MN-major, the layout that `gemm_fp8` reads best (JAX: row-major)

    Infinities saturate to +-448, NaN stays NaN. CPU and CUDA give the same bytes. docs/numerics.md has the definition
    to the bit. Not differentiable: the result carries no gradient.

    Raises ValueError or TypeError that names the argument, before anything is written; else as `gemm_fp8`.
    """
    if block not in ((1, 128), (128, 128)):
        raise ValueError(f"block: {block}; expected (1, 128) or (128, 128)")
    if out is not None:
        out = as_pair(out=out)
    return Quantized(*_frameworks.of(x, "x").quantize(x, block == (128, 128), pow2_scales, out))


def quantize_transposed(x, pow2_scales=False, out=None):
    """`quantize` of x's transpose, from x as it lies: E4M3 [K, M] with one FP32 scale per 128 rows of a column of x.

    That is the operand of a product over the rows of x, as the gradient of weights is.

    x:            [M, K] BF16, FP16 or FP32, rows contiguous, any row stride
    pow2_scales:  round scales up to powers of two
    out:          Quantized or (data, scales) to write: data [K, M], scales [K, ceil(M / 128)]; without it new
                  arrays, laid out as those of `quantize`

    Raises ValueError or TypeError that names the argument, before anything is written; else as `gemm_fp8`.
    """
    if out is not None:
        out = as_pair(out=out)
    return Quantized(*_frameworks.of(x, "x").quantize_transposed(x, pow2_scales, out))


def quantize_both(x, pow2_scales=False):
    """(quantize(x), quantize_transposed(x)), reading x once."""
    data, scales, data_t, scales_t = _frameworks.of(x, "x").quantize_both(x, pow2_scales)
    return Quantized(data, scales), Quantized(data_t, scales_t)


def dequantize(q, out=None, dtype=None):
    """q.data * q.scales in FP32, rounded once to the result's dtype.

    q:      Quantized or (data, scales); the shape of the scales tells the block
    out:    [M, K] BF16, FP16 or FP32, written and returned; without it a new array
    dtype:  of the new array, as the array library names it; FP32 by default

    Raises ValueError or TypeError that names the argument (`x`: the result), before anything is written; else as
    `gemm_fp8`.
    """
    data, scales = as_pair(q=q)
    return _frameworks.of(data, "q").dequantize(data, scales, out, dtype)


def as_pair(**argument: Any) -> tuple[Any, Any]:
    """The (data, scales) of the one argument given by name."""
    (pair,) = argument.values()
    try:
        data, scales = pair
    except (TypeError, ValueError):
        raise_no_pair(**argument)
    return data, scales


def raise_no_pair(**arguments: Any) -> NoReturn:
    for name, value in arguments.items():
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(
                f"{name}: expected a Quantized or a pair (data, scales), got {type(value).__name__}"
            ) from None
    raise AssertionError("all arguments are pairs")
