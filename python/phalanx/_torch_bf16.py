"""The BF16 products as PyTorch operators; `phalanx.torch` imports this module.

    gemm_bf16(a, b, c=None, out_dtype=None, num_sms=0, batch_invariant=False) -> D
    grouped_gemm_bf16(a, b, offsets, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False) -> D
    grouped_gemm_bf16_indexed(..., row_groups, ...), grouped_gemm_bf16_masked(..., counts, ...) -> D
    grouped_wgrad_bf16(a, b, offsets, num_sms=0) -> D

and `*_out`, which write into a tensor of the caller, the last with `accumulate`. The first two are differentiable.
"""

import torch

from phalanx import _native
from phalanx._bf16 import empty_gradient, empty_product
from phalanx._frameworks.torch import framework
from phalanx._grouped import empty_grouped
from phalanx.torch import add_gradient, define_operator, has_aligned_rows, nothing, refuse_gradient

_ops = torch.ops.phalanx


def _dtype(c, out_dtype):
    return out_dtype or (None if c is None else c.dtype)


def _empty_product(a, b, c=None, out_dtype=None, num_sms=0, batch_invariant=False):
    return empty_product(framework, a, b, _dtype(c, out_dtype))


@define_operator(
    "gemm_bf16_out(Tensor a, Tensor b, Tensor? c, Tensor(out!) out, int num_sms=0, bool batch_invariant=False) -> ()",
    nothing,
)
def _gemm_out(a, b, c, out, num_sms=0, batch_invariant=False):
    _native.gemm_bf16(a, b, out, c, num_sms, batch_invariant, None)


@define_operator(
    "gemm_bf16(Tensor a, Tensor b, Tensor? c=None, ScalarType? out_dtype=None, int num_sms=0,"
    " bool batch_invariant=False) -> Tensor",
    _empty_product,
)
def _gemm(a, b, c=None, out_dtype=None, num_sms=0, batch_invariant=False):
    out = empty_product(framework, a, b, _dtype(c, out_dtype))
    _gemm_out(a, b, c, out, num_sms, batch_invariant)
    return out


def _define_grouped(name: str, groups: str) -> None:
    operands = f"Tensor a, Tensor b, Tensor {groups}"
    options = "int num_sms=0, SymInt expected_rows=0, bool batch_invariant=False"

    def empty(a, b, groups, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
        return empty_grouped(framework, a, b, out_dtype)

    @define_operator(f"{name}_out({operands}, Tensor(out!) out, {options}) -> ()", nothing)
    def run_out(a, b, groups, out, num_sms=0, expected_rows=0, batch_invariant=False):
        getattr(_native, name)(a, b, groups, out, num_sms, expected_rows, batch_invariant, None)

    @define_operator(f"{name}({operands}, ScalarType? out_dtype=None, {options}) -> Tensor", empty)
    def run(a, b, groups, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
        out = empty_grouped(framework, a, b, out_dtype)
        run_out(a, b, groups, out, num_sms, expected_rows, batch_invariant)
        return out


_define_grouped("grouped_gemm_bf16", "offsets")
_define_grouped("grouped_gemm_bf16_indexed", "row_groups")
_define_grouped("grouped_gemm_bf16_masked", "counts")


@define_operator(
    "grouped_wgrad_bf16_out(Tensor a, Tensor b, Tensor offsets, Tensor(out!) out, bool accumulate=False, int num_sms=0)"
    " -> ()",
    nothing,
)
def _wgrad_out(a, b, offsets, out, accumulate=False, num_sms=0):
    _native.grouped_wgrad_bf16(a, b, offsets, out, accumulate, num_sms, None)


@define_operator(
    "grouped_wgrad_bf16(Tensor a, Tensor b, Tensor offsets, int num_sms=0) -> Tensor",
    lambda a, b, offsets, num_sms=0: empty_gradient(framework, a, b, offsets),
)
def _wgrad(a, b, offsets, num_sms=0):
    out = empty_gradient(framework, a, b, offsets)
    _wgrad_out(a, b, offsets, out, False, num_sms)
    return out


# --- gradients --------------------------------------------------------------------------------------------------------


def _operand(grad):
    """In BF16, rows contiguous and aligned."""
    if grad.dtype == torch.bfloat16 and has_aligned_rows(grad):
        return grad
    return framework.empty_rows(*grad.shape, torch.bfloat16, grad).copy_(grad)


def _save_dense(ctx, inputs, output):
    a, b, c, _, ctx.num_sms, _ = inputs
    ctx.save_for_backward(a, b)
    ctx.has_c = c is not None


def _dense_gradient(ctx, grad):
    a, b = ctx.saved_tensors
    needs = ctx.needs_input_grad  # of the arguments that were given
    x = _operand(grad)
    grad_a = _ops.gemm_bf16(x, b.t(), None, None, ctx.num_sms) if needs[0] else None
    if needs[1]:
        # Without rows it is a product without depth, which there is not.
        grad_b = _ops.gemm_bf16(x.t(), a.t(), None, None, ctx.num_sms) if a.shape[0] > 0 else torch.zeros_like(b)
    else:
        grad_b = None
    return grad_a, grad_b, grad if ctx.has_c and needs[2] else None, None, None, None


def _save_grouped(ctx, inputs, output):
    a, b, offsets, _, ctx.num_sms, ctx.expected_rows, ctx.batch_invariant = inputs
    ctx.save_for_backward(a, b, offsets)


def _grouped_gradient(ctx, grad):
    a, b, offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad
    x, grad_a, grad_b = _operand(grad), None, None
    if needs[0]:
        rows = torch.arange(a.shape[0], dtype=torch.int32, device=a.device)
        used = (rows >= offsets[0]) & (rows < offsets[-1])
        own = _ops.grouped_gemm_bf16(
            x, b.transpose(1, 2), offsets, None, ctx.num_sms, ctx.expected_rows, ctx.batch_invariant
        )
        grad_a = torch.where(used[:, None], own, 0)
    if needs[1]:
        grad_b = _ops.grouped_wgrad_bf16(x, a, offsets, ctx.num_sms).to(b.dtype)
    return grad_a, grad_b, None, None, None, None, None


add_gradient("gemm_bf16", _dense_gradient, _save_dense)
add_gradient("grouped_gemm_bf16", _grouped_gradient, _save_grouped)
refuse_gradient("grouped_wgrad_bf16")
