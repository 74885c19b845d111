"""Expert parallelism with gradients: `dispatch` and `combine` of an ExpertParallel as torch.autograd functions.

The gradient of dispatch is combine without weights, and that of combine is a dispatch with the same routing. All ranks
run forward and backward in the same order, as all collective work.
"""

import torch

from phalanx._ep import Dispatched
from phalanx.torch import aligned_rows


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ep, topk_idx, topk_weights, capacity):
        result = ep.dispatch(x, topk_idx, topk_weights, capacity=capacity)
        if capacity is not None:  # what lies behind was not written, and gradients of parameters would sum 0 * NaN
            behind = torch.arange(capacity, device=x.device) >= result.offsets[-1]
            result.rows.masked_fill_(behind[:, None], 0)
            result.row_weights.masked_fill_(behind, 0)
        ctx.ep, ctx.tokens = ep, len(x)
        ctx.save_for_backward(result.handle)
        ctx.mark_non_differentiable(*result[1:])
        return tuple(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows, *_):
        (handle,) = ctx.saved_tensors
        grad = ctx.ep.combine(aligned_rows(grad_rows), handle, tokens=ctx.tokens, weighted=False)
        return grad, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, topk_weights, ep, result, tokens):
        ctx.ep, ctx.tokens = ep, tokens
        ctx.save_for_backward(rows, result.handle, result.row_weights)
        return ep.combine(rows, result.handle, tokens=tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        rows, handle, row_weights = ctx.saved_tensors
        capacity = len(rows)
        grad = ctx.ep.dispatch(aligned_rows(grad_out), handle=handle, capacity=capacity)
        end = grad.offsets[-1]
        real = (torch.arange(capacity, device=rows.device) < end)[:, None]  # what lies behind was not written
        grad_rows = torch.where(real, grad.rows, 0).float()
        values = (grad_rows * torch.where(real, rows, 0).float()).sum(1)
        _, grad_weights = ctx.ep.combine_values(rows, values, handle, tokens=ctx.tokens)
        row_weights = torch.where(real[:, 0], row_weights, 0)
        grad_weights = grad_weights if ctx.needs_input_grad[1] else None
        return (grad_rows * row_weights[:, None]).to(rows.dtype), grad_weights, None, None, None


def dispatch(ep, x, topk_idx, topk_weights=None, capacity=None):
    """`ep.dispatch` of BF16 x, by an ExpertParallel with dtype="bf16". Returns (rows, result): rows carry the gradient,
    result is the phalanx.Dispatched. Rows behind the last offset are 0."""
    weights = None if topk_weights is None else topk_weights.detach()
    result = Dispatched(*_Dispatch.apply(x, ep, topk_idx, weights, capacity))
    return result.rows, result


def combine(ep, rows, result, topk_weights=None, *, tokens):
    """`ep.combine` of BF16 rows with the weights that were dispatched (None where none were), to which the gradient
    goes."""
    return _Combine.apply(rows, topk_weights, ep, result, tokens)
