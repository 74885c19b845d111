"""Products of many groups at once, and weight gradients: the experts of a mixture-of-experts layer."""

from typing import Any

from phalanx import _frameworks, _native
from phalanx._activation import as_limit
from phalanx._api import Quantized, as_pair
from phalanx._frameworks.base import Framework, check_untraced, padded, shape_of


def grouped_gemm_fp8(a, b, offsets, out=None, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
    """Row i of D = row i of A · B[g]ᵀ, for offsets[g] <= i < offsets[g + 1]: each expert's rows, no padding anywhere.

    a:              Quantized or (data, scales): data E4M3 [M, K], scales FP32 [M, ceil(K / 128)], best MN-major
    b:              Quantized or (data, scales): data E4M3 [G, N, K], scales FP32 [G, ceil(N / 128), ceil(K / 128)]
    offsets:        int32 [G + 1] on the device of `a`: 0 <= offsets[0] <= ... <= offsets[G] <= M. Any number of rows in
                    a group, 0 included; nothing about them is needed on the host
    out:            [M, N] BF16 or FP32, written and returned; without it a new array. Rows of no group are not written
    out_dtype:      of the new array, as the array library names it; BF16 by default
    num_sms:        as in `gemm_fp8`
    expected_rows:  of a group: helps to choose a kernel, and nothing else
    batch_invariant:  a row's bits depend on that row and its group's B alone. On CUDA they always do; the CPU takes
                    longer for it

    1 <= G <= 512; the other rules, and what it raises, are `gemm_fp8`'s. Wrong offsets raise ValueError: on the CPU at
    once; on CUDA, where only the kernel sees them, it stays inside the arrays, and the next grouped call on that device
    raises, or `check_groups`.
    """
    return _grouped("", a, b, offsets, out, out_dtype, num_sms, expected_rows, batch_invariant)


def grouped_gemm_fp8_indexed(
    a, b, row_groups, out=None, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False
):
    """The same, where row i belongs to group row_groups[i], or to none if that is -1.

    row_groups:  int32 [M]. The rows of one group lie together, with no others, nor -1, between; a group in several
                 pieces is left out and reported
    """
    return _grouped("_indexed", a, b, row_groups, out, out_dtype, num_sms, expected_rows, batch_invariant)


def grouped_gemm_fp8_masked(a, b, counts, out=None, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
    """D[g] = A[g] · B[g]ᵀ, the first counts[g] rows only; the others are neither used nor written.

    a:       Quantized or (data, scales): data E4M3 [G, R, K], any R; scales FP32 [G, R, ceil(K / 128)]
    counts:  int32 [G]: 0 <= counts[g] <= R
    out:     [G, R, N]
    """
    return _grouped("_masked", a, b, counts, out, out_dtype, num_sms, expected_rows, batch_invariant)


def grouped_gemm_fp8_swiglu(
    a,
    b,
    offsets,
    weights=None,
    limit=None,
    pow2_scales=False,
    out=None,
    num_sms=0,
    expected_rows=0,
    gates_and_ups=None,
    batch_invariant=False,
):
    """`swiglu_quantize` of `grouped_gemm_fp8`, the same bytes in one kernel: what an expert's second product reads.

    a, offsets:     as in `grouped_gemm_fp8`, as are num_sms, expected_rows and batch_invariant
    b:              data E4M3 [G, 2 I, K], all gates and then as many ups; I is a multiple of 128
    weights:        as in `swiglu_quantize`, as are limit and pow2_scales
    out:            Quantized or (data, scales) to write: data [M, I], scales [M, I / 128]; without it new arrays. What
                    rows of no group hold afterwards is undefined
    gates_and_ups:  BF16 [M, 2 I], room for what lies between: with it two kernels do the work where they are quicker.
                    Not used under torch.compile
    """
    (a_data, a_scales), (b_data, b_scales) = as_pair(a=a), as_pair(b=b)
    if out is not None:
        out = as_pair(out=out)
    framework = _frameworks.of(a_data, "a")
    operands = a_data, a_scales, b_data, b_scales, offsets, weights
    options = as_limit(limit), pow2_scales, num_sms, expected_rows, batch_invariant
    if framework.is_traced(a_data, b_data, offsets):
        check_untraced(out)
        return Quantized(*framework.traced("grouped_gemm_fp8_swiglu", operands, None, (), options))
    if out is None:
        out = empty_swiglu(framework, a_data, b_data)
    else:
        framework.check_out(out, None)
    data, scales = out
    framework.check_writable("gates_and_ups", gates_and_ups)
    arguments = (
        *(None if array is None else framework.view(array) for array in operands),
        None if gates_and_ups is None else framework.writable_view(gates_and_ups),
        framework.writable_view(data),
        framework.writable_view(scales),
        *options,
    )
    return Quantized(*framework.run("grouped_gemm_fp8_swiglu", arguments, a_data, (data, scales)))


def wgrad_fp8(a, b, out=None, accumulate=False, num_sms=0):
    """D = A · Bᵀ in FP32, or D += with `accumulate`, where both have a scale per 1 x 128: a weight's gradient.

    a, b:        Quantized or (data, scales): E4M3 [M, K] and [N, K], K being tokens; scales FP32 [M or N, ceil(K/128)]
    out:         FP32 [M, N], written and returned; without it a new array
    accumulate:  add to what `out` holds
    """
    return _wgrad(a, b, None, out, accumulate, num_sms)


def grouped_wgrad_fp8(a, b, offsets, out=None, accumulate=False, num_sms=0):
    """D[g] = A · Bᵀ, or D[g] +=, over the columns offsets[g] <= k < offsets[g + 1]: every expert's gradient.

    offsets:  int32 [G + 1]: 0 <= offsets[0] <= ... <= offsets[G] <= K, groups of any size. The scales' blocks of 128
              columns count from column 0, whatever the groups
    out:      FP32 [G, M, N]; D[g] of an empty group becomes zero, or stays with `accumulate`
    """
    shape_of("offsets", offsets)  # None would be the product of all columns
    return _wgrad(a, b, offsets, out, accumulate, num_sms)


def check_groups(like):
    """Raises what a kernel found wrong with offsets, row groups or counts of an earlier call on the device of `like`.

    Does not wait: synchronise first to hear of everything enqueued so far.
    """
    framework = _frameworks.of(like, "like")
    cuda, index = framework.device_of(like)
    _native.check_groups(cuda, index)


def _grouped(form: str, a, b, groups, out, out_dtype, num_sms, expected_rows, batch_invariant):
    (a_data, a_scales), (b_data, b_scales) = as_pair(a=a), as_pair(b=b)
    framework = _frameworks.of(a_data, "a")
    operands, name = (a_data, a_scales, b_data, b_scales, groups), "grouped_gemm_fp8" + form
    options = num_sms, expected_rows, batch_invariant
    if framework.is_traced(a_data, b_data, groups):
        return framework.traced(name, operands, out, (out_dtype,), options)
    if out is None:
        out = empty_grouped(framework, a_data, b_data, out_dtype)
    else:
        framework.check_out(out, out_dtype)
    views = [framework.view(array) for array in operands]
    return framework.run(name, (*views, framework.writable_view(out), *options), a_data, out)


def _wgrad(a, b, offsets, out, accumulate, num_sms):
    (a_data, a_scales), (b_data, b_scales) = as_pair(a=a), as_pair(b=b)
    if accumulate and out is None:
        raise ValueError("accumulate: True without `out`; expected an array to add to")
    framework = _frameworks.of(a_data, "a")
    operands = (a_data, a_scales, b_data, b_scales) + (() if offsets is None else (offsets,))
    if framework.is_traced(a_data, b_data):
        name = "wgrad_fp8" if offsets is None else "grouped_wgrad_fp8"
        return framework.traced(name, operands, out, (), (accumulate, num_sms) if out is not None else (num_sms,))
    if out is None:
        out = empty_gradient(framework, a_data, b_data, offsets)
    else:
        framework.check_out(out, None)
    views = [framework.view(array) for array in operands] + ([None] if offsets is None else [])
    return framework.run("wgrad_fp8", (*views, framework.writable_view(out), accumulate, num_sms), a_data, out)


def empty_grouped(framework: Framework, a: Any, b: Any, out_dtype: Any) -> Any:
    """A new D: [M, N], or [G, R, N] for a stack."""
    of_a, of_b = shape_of("a", a), shape_of("b", b)
    if len(of_a) not in (2, 3) or len(of_b) != 3:
        raise ValueError(f"a, b: shapes {of_a}, {of_b}; expected [M, K] or [G, R, K], and [G, N, K]")
    return empty_stack(framework, (*of_a[:-1], of_b[1]), framework.bf16 if out_dtype is None else out_dtype, a)


def empty_swiglu(framework: Framework, a: Any, b: Any) -> tuple[Any, Any]:
    """Data and scales [M, I] and [M, I / 128]."""
    of_a, of_b = shape_of("a", a), shape_of("b", b)
    if len(of_a) != 2 or len(of_b) != 3:
        raise ValueError(f"a, b: shapes {of_a}, {of_b}; expected [M, K] and [G, 2 I, K]")
    return framework.empty_quantized(of_a[0], of_b[1] // 2, False, a)


def empty_gradient(framework: Framework, a: Any, b: Any, offsets: Any) -> Any:
    """A new D: [M, N], or [G, M, N] with offsets."""
    of_a, of_b = shape_of("a.data", a), shape_of("b.data", b)
    if len(of_a) != 2 or len(of_b) != 2:
        raise ValueError(f"a.data, b.data: shapes {of_a}, {of_b}; expected two matrices")
    return empty_stack(framework, (*stack_of(offsets), of_a[0], of_b[0]), framework.f32, a)


def stack_of(offsets: Any) -> tuple[int, ...]:
    """(G,), or () without offsets."""
    if offsets is None:
        return ()
    shape = shape_of("offsets", offsets)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"offsets: shape {[*shape]}; expected [G + 1], G being 1 to 512")
    return (shape[0] - 1,)


def empty_stack(framework: Framework, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """A new matrix, or a stack: row-major, rows padded to 16 bytes."""
    row = padded(shape[-1], 16 // framework.itemsize(dtype))
    strides = (row, 1) if len(shape) == 2 else (shape[1] * row, row, 1)
    return framework.empty(shape, strides, dtype, like)
