"""Routing, permuting and un-permuting as PyTorch operators with gradients; `phalanx.torch` imports this module.

    route(topk_idx, num_experts, capacity, alignment, max_rows) -> (counts, offsets, slots, sources, needed)
    permute(x, slots, sources, max_rows, zero_padding) -> rows
    permute_quantized(data, scales, slots, sources, max_rows, zero_padding) -> (data, scales)
    route_and_permute(x, topk_idx, num_experts, capacity, alignment, max_rows, zero_padding)
        -> (counts, offsets, slots, sources, needed, rows, scales)       scales: empty
    route_and_permute_quantized(data, scales, topk_idx, ...) -> the same
    unpermute(rows, slots, sources, weights, residual, out_dtype) -> out
    unpermute_backward(grad_out, slots, sources, weights, rows, rows_dtype, max_rows, zero_padding)
        -> (grad_rows, grad_weights)                                     grad_weights: empty without rows

Gradients: of `permute` and `route_and_permute` for x; of `unpermute` for rows, weights and residual.
"""

import torch

from phalanx import _moe
from phalanx._frameworks.torch import framework
from phalanx.torch import add_gradient, aligned_rows, define_operator, refuse_gradient

_ROUTING = "Tensor, Tensor, Tensor, Tensor, Tensor"
# SymInt: what follows from the number of tokens does not tie a trace to it.
_TARGET = "int num_experts, SymInt capacity, int alignment, SymInt max_rows"
_ROWS = "SymInt max_rows, bool zero_padding"


def _routing(slots, sources, max_rows=0):
    """Of which only these are read."""
    return _moe.Routing(None, None, slots, sources, None, max_rows)


def _empty_route(topk_idx, num_experts, capacity, alignment, max_rows):
    return _moe.empty_routing(framework, topk_idx, num_experts, capacity, max_rows)[:5]


@define_operator(f"route(Tensor topk_idx, {_TARGET}) -> ({_ROUTING})", _empty_route)
def _route(topk_idx, num_experts, capacity, alignment, max_rows):
    return _moe.route(topk_idx, num_experts, None if max_rows else capacity, alignment, max_rows)[:5]


# --- permute ----------------------------------------------------------------------------------------------------------


def _empty_permuted(x, slots, sources, max_rows, zero_padding):
    return _moe.empty_rows_of(framework, x, None, _routing(slots, sources, max_rows))[0]


@define_operator(f"permute(Tensor x, Tensor slots, Tensor sources, {_ROWS}) -> Tensor", _empty_permuted)
def _permute(x, slots, sources, max_rows, zero_padding):
    return _moe.permute(x.detach(), _routing(slots, sources, max_rows), zero_padding=zero_padding)


def _empty_permuted_quantized(data, scales, slots, sources, max_rows, zero_padding):
    return _moe.empty_rows_of(framework, data, scales, _routing(slots, sources, max_rows))


@define_operator(
    f"permute_quantized(Tensor data, Tensor scales, Tensor slots, Tensor sources, {_ROWS}) -> (Tensor, Tensor)",
    _empty_permuted_quantized,
)
def _permute_quantized(data, scales, slots, sources, max_rows, zero_padding):
    return tuple(_moe.permute((data, scales), _routing(slots, sources, max_rows), zero_padding=zero_padding))


def _empty_routed(x, topk_idx, num_experts, capacity, alignment, max_rows, zero_padding):
    routing = _moe.empty_routing(framework, topk_idx, num_experts, capacity, max_rows)
    rows, _ = _moe.empty_rows_of(framework, x, None, routing)
    return (*routing[:5], rows, x.new_empty(0, dtype=torch.float32))


@define_operator(
    f"route_and_permute(Tensor x, Tensor topk_idx, {_TARGET}, bool zero_padding) -> ({_ROUTING}, Tensor, Tensor)",
    _empty_routed,
)
def _route_and_permute(x, topk_idx, num_experts, capacity, alignment, max_rows, zero_padding):
    capacity = None if max_rows else capacity
    rows, routing = _moe.route_and_permute(
        x.detach(), topk_idx, num_experts, capacity, alignment, max_rows, zero_padding=zero_padding
    )
    return (*routing[:5], rows, x.new_empty(0, dtype=torch.float32))


def _empty_routed_quantized(data, scales, topk_idx, num_experts, capacity, alignment, max_rows, zero_padding):
    routing = _moe.empty_routing(framework, topk_idx, num_experts, capacity, max_rows)
    return (*routing[:5], *_moe.empty_rows_of(framework, data, scales, routing))


@define_operator(
    f"route_and_permute_quantized(Tensor data, Tensor scales, Tensor topk_idx, {_TARGET}, bool zero_padding)"
    f" -> ({_ROUTING}, Tensor, Tensor)",
    _empty_routed_quantized,
)
def _route_and_permute_quantized(data, scales, topk_idx, num_experts, capacity, alignment, max_rows, zero_padding):
    capacity = None if max_rows else capacity
    rows, routing = _moe.route_and_permute(
        (data, scales), topk_idx, num_experts, capacity, alignment, max_rows, zero_padding=zero_padding
    )
    return (*routing[:5], *rows)


def _sum_of_rows(ctx, grad_rows):
    """The gradient of x: every token's rows summed."""
    slots, sources = ctx.saved_tensors
    return torch.ops.phalanx.unpermute(aligned_rows(grad_rows), slots, sources, None, None, ctx.dtype)


def _keep_permute(ctx, inputs, output):
    x, slots, sources, *_ = inputs
    ctx.save_for_backward(slots, sources)
    ctx.dtype = x.dtype


def _keep_route_and_permute(ctx, inputs, output):
    ctx.save_for_backward(output[2], output[3])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[:5], output[6])


add_gradient("permute", lambda ctx, grad: (_sum_of_rows(ctx, grad), None, None, None, None), _keep_permute)
add_gradient(
    "route_and_permute", lambda ctx, *grads: (_sum_of_rows(ctx, grads[5]), *[None] * 6), _keep_route_and_permute
)


# --- unpermute --------------------------------------------------------------------------------------------------------


def _empty_unpermuted(rows, slots, sources, weights, residual, out_dtype):
    return _moe.empty_tokens(framework, rows, slots, out_dtype)


@define_operator(
    "unpermute(Tensor rows, Tensor slots, Tensor sources, Tensor? weights, Tensor? residual, ScalarType out_dtype)"
    " -> Tensor",
    _empty_unpermuted,
)
def _unpermute(rows, slots, sources, weights, residual, out_dtype):
    rows, weights, residual = (t if t is None else t.detach() for t in (rows, weights, residual))
    return _moe.unpermute(rows, _routing(slots, sources), weights, residual, out_dtype=out_dtype)


def _empty_unpermute_gradients(grad_out, slots, sources, weights, rows, rows_dtype, max_rows, zero_padding):
    return _moe.empty_gradients(framework, grad_out, slots, sources, rows, rows_dtype, max_rows)


@define_operator(
    "unpermute_backward(Tensor grad_out, Tensor slots, Tensor sources, Tensor? weights, Tensor? rows,"
    f" ScalarType rows_dtype, {_ROWS}) -> (Tensor, Tensor)",
    _empty_unpermute_gradients,
)
def _unpermute_backward(grad_out, slots, sources, weights, rows, rows_dtype, max_rows, zero_padding):
    routing = _routing(slots, sources, max_rows)
    grads = _moe.unpermute_backward(grad_out, routing, weights, rows, rows_dtype, zero_padding)
    return grads[0], grad_out.new_empty((0, 0), dtype=torch.float32) if grads[1] is None else grads[1]


def _keep_unpermute(ctx, inputs, output):
    rows, slots, sources, weights, residual, _ = inputs
    wants_weights = weights is not None and weights.requires_grad
    ctx.save_for_backward(slots, sources, weights, rows if wants_weights else None)
    ctx.rows_dtype, ctx.max_rows = rows.dtype, rows.shape[1] if rows.dim() == 3 else 0
    ctx.has_residual = residual is not None


def _unpermute_gradient(ctx, grad):
    slots, sources, weights, rows = ctx.saved_tensors
    grad = aligned_rows(grad)
    grad_rows, grad_weights = torch.ops.phalanx.unpermute_backward(
        grad, slots, sources, weights, rows, ctx.rows_dtype, ctx.max_rows, True
    )
    return grad_rows, None, None, grad_weights if rows is not None else None, grad if ctx.has_residual else None, None


add_gradient("unpermute", _unpermute_gradient, _keep_unpermute)
refuse_gradient("unpermute_backward")
