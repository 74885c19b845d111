"""BF16 products: dense, of groups, and the gradients of experts' weights."""

from typing import Any

from phalanx import _frameworks
from phalanx._frameworks.base import Framework, dtype_of, matrix_shape
from phalanx._grouped import empty_grouped, empty_stack, stack_of


def gemm_bf16(a, b, c=None, out=None, out_dtype=None, num_sms=0, batch_invariant=False):
    """D = A · Bᵀ (+ C), summed in FP32 and rounded once.

    a:          BF16 [M, K], contiguous along K or along M: `x.t()` of a row-major x [K, M] serves
    b:          BF16 [N, K], contiguous along K or along N
    c:          [M, N] of the result's dtype, added to the product; may be `out` itself
    out:        [M, N] BF16 or FP32, rows contiguous, written and returned; without it a new array
    out_dtype:  BF16 or FP32, as the array library names it; by default that of `out`, else of `c`, else BF16
    num_sms, batch_invariant: as in `gemm_fp8`

    M >= 0, N >= 1, K >= 1; bases 16-byte aligned, the other strides multiples of 16 bytes. Differentiable in torch, and
    else, also in what it raises, as `gemm_fp8`.
    """
    framework = _frameworks.of(a, "a")
    if out is None and out_dtype is None and c is not None:
        out_dtype = dtype_of("c", c)
    if framework.is_traced(a, b) or _is_recorded(framework, out, a, b, c):
        return framework.traced("gemm_bf16", (a, b, c), out, (out_dtype,), (num_sms, batch_invariant))
    if out is None:
        out = empty_product(framework, a, b, out_dtype)
    else:
        framework.check_out(out, out_dtype)
    view = framework.view
    c_view = None if c is None else view(c)
    arguments = view(a), view(b), framework.writable_view(out), c_view, num_sms, batch_invariant
    return framework.run("gemm_bf16", arguments, a, out)


def grouped_gemm_bf16(a, b, offsets, out=None, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
    """Row i of D = row i of A · B[g]ᵀ, for offsets[g] <= i < offsets[g + 1].

    a:        BF16 [M, K], rows contiguous
    b:        BF16 [G, N, K], each matrix contiguous along K or along N: `w.transpose(1, 2)` serves
    offsets:  int32 [G + 1], on the device of `a`: 0 <= offsets[0] <= ... <= offsets[G] <= M
    out:      [M, N] BF16 or FP32, written and returned; without it a new array. Rows of no group are not written

    Differentiable in torch, once. Options, the rules of groups and what it raises are those of `grouped_gemm_fp8`.
    """
    return _grouped("", a, b, offsets, out, out_dtype, num_sms, expected_rows, batch_invariant)


def grouped_gemm_bf16_indexed(
    a, b, row_groups, out=None, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False
):
    """The same, where row i belongs to group row_groups[i], or to none if it is -1; see `grouped_gemm_fp8_indexed`.

    Not differentiable.
    """
    return _grouped("_indexed", a, b, row_groups, out, out_dtype, num_sms, expected_rows, batch_invariant)


def grouped_gemm_bf16_masked(a, b, counts, out=None, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
    """D[g] = A[g] · B[g]ᵀ, the first counts[g] rows of A [G, R, K] and D [G, R, N]; see `grouped_gemm_fp8_masked`.

    Not differentiable.
    """
    return _grouped("_masked", a, b, counts, out, out_dtype, num_sms, expected_rows, batch_invariant)


def grouped_wgrad_bf16(a, b, offsets, out=None, accumulate=False, num_sms=0):
    """D[g] = A[rows of g]ᵀ · B[rows of g], or D[g] +=: every expert's gradient, from tokens as they lie.

    a, b:        BF16 [T, M] and [T, N], rows contiguous: the gradient of the expert's output and its input
    offsets:     int32 [G + 1]: 0 <= offsets[0] <= ... <= offsets[G] <= T, groups of any size
    out:         FP32 [G, M, N]; D[g] of an empty group becomes zero, or stays with `accumulate`
    accumulate:  add to what `out` holds
    """
    if accumulate and out is None:
        raise ValueError("accumulate: True without `out`; expected an array to add to")
    framework = _frameworks.of(a, "a")
    operands = a, b, offsets
    if framework.is_traced(*operands):
        options = (accumulate, num_sms) if out is not None else (num_sms,)
        return framework.traced("grouped_wgrad_bf16", operands, out, (), options)
    if out is None:
        out = empty_gradient(framework, a, b, offsets)
    else:
        framework.check_out(out, None)
    views = [framework.view(array) for array in operands]
    return framework.run("grouped_wgrad_bf16", (*views, framework.writable_view(out), accumulate, num_sms), a, out)


def _grouped(form: str, a, b, groups, out, out_dtype, num_sms, expected_rows, batch_invariant):
    framework = _frameworks.of(a, "a")
    operands, name, options = (a, b, groups), "grouped_gemm_bf16" + form, (num_sms, expected_rows, batch_invariant)
    if framework.is_traced(a, b, groups) or (form == "" and _is_recorded(framework, out, a, b)):
        return framework.traced(name, operands, out, (out_dtype,), options)
    if out is None:
        out = empty_grouped(framework, a, b, out_dtype)
    else:
        framework.check_out(out, out_dtype)
    views = [framework.view(array) for array in operands]
    return framework.run(name, (*views, framework.writable_view(out), *options), a, out)


def _is_recorded(framework: Framework, out: Any, *arrays: Any) -> bool:
    """Whether the call is to be recorded for gradients."""
    recorded = framework.needs_gradient(*arrays)
    if recorded and out is not None:
        raise ValueError("out: given to a call that is differentiated; expected none")
    return recorded


def empty_product(framework: Framework, a: Any, b: Any, out_dtype: Any) -> Any:
    """A new D [M, N]."""
    rows, cols = matrix_shape("a", a)[0], matrix_shape("b", b)[0]
    return framework.empty_rows(rows, cols, framework.bf16 if out_dtype is None else out_dtype, a)


def empty_gradient(framework: Framework, a: Any, b: Any, offsets: Any) -> Any:
    """A new D [G, M, N]."""
    shape = *stack_of(offsets), matrix_shape("a", a)[1], matrix_shape("b", b)[1]
    return empty_stack(framework, shape, framework.f32, a)
