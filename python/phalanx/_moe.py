"""Tokens to their experts and back, on one device."""

from typing import Any, NamedTuple

from phalanx import _frameworks
from phalanx._api import Quantized, as_pair
from phalanx._frameworks.base import (
    Framework,
    check_count,
    check_integer,
    dtype_of,
    matrix_shape,
    num_blocks,
    padded,
)


class Routing(NamedTuple):
    """Which row each choice of an expert takes; made by `route`. Rows are in order of expert, then token, then choice.

    counts:    int32 [E], rows of each expert
    offsets:   int32 [E + 1], where each expert's rows begin; `grouped_gemm_fp8` reads it
    slots:     int32 [T, K], the row of each choice; -1: none. Trusted: nothing checks that a row of one's own exists
    sources:   int32 [R], t * K + k for each row; -1: padding
    needed:    int32 [1], the capacity (masked: max_rows) that has room for all; with an alignment, also for padding
               behind the last expert
    max_rows:  rows of each expert in a masked target; 0: contiguous, the experts one after another
    """

    counts: Any
    offsets: Any
    slots: Any
    sources: Any
    needed: Any
    max_rows: int = 0


def route(topk_idx, num_experts, capacity=None, alignment=1, max_rows=0):
    """Gives every choice of an expert a row, on the device: counts, offsets, and the map in both directions.

    topk_idx:   int32 or int64 [T, K], K <= 32; outside [0, num_experts), -1 say: no expert. Repeats are choices too
    capacity:   R, the rows of a contiguous target; by default as many as the worst routing takes. What finds no room
                has no row, and `needed` says what there should have been
    alignment:  of a contiguous target: each expert's rows begin at a multiple of this
    max_rows:   makes the target masked, R = num_experts * max_rows: so many rows for each expert

    num_experts is 1 to 1024. The same routing gives the same rows on CPU and CUDA; nothing waits for the device.

    Raises ValueError or TypeError that names the argument, before anything is written; else as `gemm_fp8`.
    """
    framework = _frameworks.of(topk_idx, "topk_idx")
    capacity = _capacity(topk_idx, num_experts, capacity, alignment, max_rows)
    if framework.is_traced(topk_idx):
        fields = framework.traced("route", (topk_idx,), None, (num_experts, capacity), (alignment, max_rows))
        return Routing(*fields, max_rows)
    routing = empty_routing(framework, topk_idx, num_experts, capacity, max_rows)
    arguments = framework.view(topk_idx), *_views(framework, routing), alignment, max_rows
    return framework.run("route", arguments, topk_idx, routing)


def permute(x, routing, out=None, zero_padding=True):
    """rows[slots[t, k]] = x[t], byte by byte: each token to the rows of its experts.

    x:             [T, H] BF16 or FP32; or Quantized or (data, scales): data E4M3 [T, H], scales FP32 [T, ceil(H / 128)]
    out:           [R, H], or a Quantized or pair, to write; [num_experts, max_rows, H] for a masked target. Without it
                   new arrays, scales MN-major (of each expert), as the grouped products read them best (JAX: row-major)
    zero_padding:  rows of no token become zeros, with scales of 1; else they stay as they were

    H is a multiple of 16 bytes. PyTorch: differentiable for BF16 and FP32 (the gradients of a token's rows are summed
    in FP32).
    """
    _check_routing(routing)
    data, scales = _split(x)
    framework = _frameworks.of(data, "x")
    if _operator_wanted(framework, out, data):
        name = "permute" if scales is None else "permute_quantized"
        operands = (data,) if scales is None else (data, scales)
        operands += routing.slots, routing.sources
        rows = framework.traced(name, operands, None, (), (routing.max_rows, zero_padding))
        return rows if scales is None else Quantized(*rows)
    out_data, out_scales = _outputs(framework, out, data, scales, routing)
    views = (*_pair_views(framework.view, data, scales), framework.view(routing.slots), framework.view(routing.sources))
    out_views = _pair_views(framework.writable_view, out_data, out_scales)
    made = framework.run("permute", (*views, *out_views, zero_padding), data, (out_data, out_scales))
    return _joined(out, *made)


def route_and_permute(x, topk_idx, num_experts, capacity=None, alignment=1, max_rows=0, out=None, zero_padding=True):
    """`route` and `permute`, which for few tokens are one kernel. Returns (rows, routing)."""
    data, scales = _split(x)
    framework = _frameworks.of(data, "x")
    capacity = _capacity(topk_idx, num_experts, capacity, alignment, max_rows)
    options = alignment, max_rows, zero_padding
    if _operator_wanted(framework, out, data):
        name = "route_and_permute" if scales is None else "route_and_permute_quantized"
        operands = (data,) if scales is None else (data, scales)
        *fields, rows, scales = framework.traced(name, (*operands, topk_idx), None, (num_experts, capacity), options)
        return rows if name == "route_and_permute" else Quantized(rows, scales), Routing(*fields, max_rows)
    routing = empty_routing(framework, topk_idx, num_experts, capacity, max_rows)
    out_data, out_scales = _outputs(framework, out, data, scales, routing)
    arguments = (
        *_pair_views(framework.view, data, scales),
        framework.view(topk_idx),
        *_views(framework, routing),
        *_pair_views(framework.writable_view, out_data, out_scales),
        zero_padding,
        alignment,
        max_rows,
    )
    made, routing = framework.run("route_and_permute", arguments, data, ((out_data, out_scales), routing))
    return _joined(out, *made), routing


def unpermute(rows, routing, weights=None, residual=None, out=None, out_dtype=None):
    """out[t] = sum over k of weights[t, k] * rows[slots[t, k]] (+ residual[t]), in FP32 in the order of k.

    rows:       [R, H] or [num_experts, max_rows, H], BF16 or FP32
    weights:    FP32 [T, K]; without them 1
    residual:   [T, H] of the result's dtype, added last; may be `out` itself
    out:        [T, H] BF16 or FP32, written and returned; without it a new array
    out_dtype:  of the new array, as the array library names it; by default that of `residual`, else of `rows`

    Choices without a row add nothing. CPU and CUDA give the same bits. PyTorch: differentiable, once.
    """
    _check_routing(routing)
    framework = _frameworks.of(rows, "rows")
    if out_dtype is None and out is None:
        out_dtype = rows.dtype if residual is None else dtype_of("residual", residual)
    if _operator_wanted(framework, out, rows, weights, residual):
        operands = rows, routing.slots, routing.sources, weights, residual
        return framework.traced("unpermute", operands, None, (out_dtype,), ())
    if out is None:
        out = empty_tokens(framework, rows, routing.slots, out_dtype)
    else:
        framework.check_out(out, out_dtype)
    view = framework.view
    weights_view, residual_view = (None if array is None else view(array) for array in (weights, residual))
    operands = view(rows), view(routing.slots), view(routing.sources), weights_view, residual_view
    return framework.run("unpermute", (*operands, framework.writable_view(out)), rows, out)


def unpermute_backward(grad_out, routing, weights=None, rows=None, rows_dtype=None, zero_padding=True):
    """The gradients of `unpermute`, as (grad_rows, grad_weights).

    grad_out:      [T, H] BF16 or FP32
    weights:       as in `unpermute`
    rows:          those that were un-permuted: grad_weights[t, k] is their FP32 dot product with grad_out[t]; without
                   them it is None
    rows_dtype:    BF16 or FP32; by default that of `rows`, else of `grad_out`
    zero_padding:  padding rows of grad_rows become zeros; else they are left as they are
    """
    _check_routing(routing)
    framework = _frameworks.of(grad_out, "grad_out")
    if rows_dtype is None:
        rows_dtype = grad_out.dtype if rows is None else dtype_of("rows", rows)
    if framework.is_traced(grad_out):
        operands = grad_out, routing.slots, routing.sources, weights, rows
        options = rows_dtype, routing.max_rows, zero_padding
        grad_rows, grad_weights = framework.traced("unpermute_backward", operands, None, options, ())
    else:
        grads = empty_gradients(framework, grad_out, routing.slots, routing.sources, rows, rows_dtype, routing.max_rows)
        grad_rows, grad_weights = grads
        view = framework.view
        weights_view, rows_view = (None if array is None else view(array) for array in (weights, rows))
        arguments = (
            view(grad_out),
            view(routing.slots),
            view(routing.sources),
            weights_view,
            rows_view,
            framework.writable_view(grad_rows),
            None if rows is None else framework.writable_view(grad_weights),
            zero_padding,
        )
        grad_rows, grad_weights = framework.run("unpermute_backward", arguments, grad_out, grads)
    return grad_rows, None if rows is None else grad_weights


# --- allocation -------------------------------------------------------------------------------------------------------


def empty_routing(framework: Framework, topk_idx: Any, num_experts: int, capacity: int, max_rows: int) -> Routing:
    tokens, topk = matrix_shape("topk_idx", topk_idx)

    def vector(size: int) -> Any:
        return framework.empty((size,), (1,), framework.i32, topk_idx)

    slots = framework.empty((tokens, topk), (topk, 1), framework.i32, topk_idx)
    return Routing(vector(num_experts), vector(num_experts + 1), slots, vector(capacity), vector(1), max_rows)


def empty_rows(framework: Framework, num_rows: int, hidden: int, max_rows: int, dtype: Any, like: Any) -> Any:
    """Rows of experts: a matrix, or for a masked target a stack of them."""
    if max_rows == 0:
        return framework.empty((num_rows, hidden), (hidden, 1), dtype, like)
    shape = (num_rows // max_rows, max_rows, hidden)
    return framework.empty(shape, (max_rows * hidden, hidden, 1), dtype, like)


def empty_scales(framework: Framework, num_rows: int, hidden: int, max_rows: int, like: Any) -> Any:
    """Theirs, MN-major, columns padded to 16 bytes so that TMA can read them."""
    columns = num_blocks(hidden)
    if max_rows == 0:
        return framework.empty((num_rows, columns), (1, padded(num_rows, 4)), framework.f32, like)
    shape, pitch = (num_rows // max_rows, max_rows, columns), padded(max_rows, 4)
    return framework.empty(shape, (columns * pitch, 1, pitch), framework.f32, like)


def empty_rows_of(framework: Framework, data: Any, scales: Any, routing: Routing) -> tuple[Any, Any]:
    hidden, num_rows = matrix_shape("x", data)[1], routing.sources.shape[0]
    rows = empty_rows(framework, num_rows, hidden, routing.max_rows, data.dtype, data)
    if scales is None:
        return rows, None
    return rows, empty_scales(framework, num_rows, hidden, routing.max_rows, data)


def empty_tokens(framework: Framework, rows: Any, slots: Any, dtype: Any) -> Any:
    return framework.empty_rows(slots.shape[0], rows.shape[-1], dtype, rows)


def empty_gradients(
    framework: Framework, grad_out: Any, slots: Any, sources: Any, rows: Any, dtype: Any, max_rows: int
) -> tuple[Any, Any]:
    """Of rows and weights; the second is empty without `rows`."""
    hidden = matrix_shape("grad_out", grad_out)[1]
    shape = (0, 0) if rows is None else tuple(slots.shape)
    grad_weights = framework.empty(shape, (shape[1], 1), framework.f32, grad_out)
    return empty_rows(framework, sources.shape[0], hidden, max_rows, dtype, grad_out), grad_weights


# --- arguments --------------------------------------------------------------------------------------------------------


def _capacity(topk_idx: Any, num_experts: int, capacity: int | None, alignment: int, max_rows: int) -> int:
    tokens, topk = matrix_shape("topk_idx", topk_idx)
    for name, value in (("num_experts", num_experts), ("alignment", alignment), ("max_rows", max_rows)):
        check_integer(name, value)
    if capacity is not None:
        check_count("capacity", capacity)
    if not 1 <= num_experts <= 1024:
        raise ValueError(f"num_experts: {num_experts}; expected 1 to 1024")
    if not 1 <= alignment <= 65536:
        raise ValueError(f"alignment: {alignment}; expected 1 to 65536")
    if max_rows < 0:
        raise ValueError(f"max_rows: {max_rows}; expected 0 (a contiguous target) or more")
    if max_rows:
        if capacity is not None:
            raise ValueError(f"capacity: {capacity} with max_rows {max_rows}; expected one of the two")
        return num_experts * max_rows
    if capacity is None:
        choices = tokens * topk
        # Every expert that is chosen at all pads its rows.
        return choices if alignment == 1 else choices + min(num_experts, choices) * (alignment - 1)
    return capacity


def _check_routing(routing: Any) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")


def _split(x: Any) -> tuple[Any, Any]:
    """Data and scales of a pair, or an array and None."""
    return as_pair(x=x) if isinstance(x, (tuple, list)) else (x, None)


def _outputs(framework: Framework, out: Any, data: Any, scales: Any, routing: Routing) -> tuple[Any, Any]:
    """Data and scales to write, or an array and None."""
    if out is None:
        return empty_rows_of(framework, data, scales, routing)
    framework.check_out(out, None)
    if scales is None and isinstance(out, (tuple, list)):
        raise TypeError("out: a pair; expected one array, as x has no scales")
    return (out, None) if scales is None else as_pair(out=out)


def _joined(out: Any, data: Any, scales: Any) -> Any:
    if out is not None:
        return out
    return data if scales is None else Quantized(data, scales)


def _pair_views(view: Any, data: Any, scales: Any) -> tuple[Any, Any]:
    return view(data), None if scales is None else view(scales)


def _views(framework: Framework, routing: Routing) -> list[Any]:
    return [framework.writable_view(array) for array in routing[:5]]


def _operator_wanted(framework: Framework, out: Any, *arrays: Any) -> bool:
    """Whether the call is to be recorded, for a trace or for gradients."""
    wanted = framework.is_traced(arrays[0]) or framework.needs_gradient(*arrays)
    if wanted and out is not None:
        raise ValueError("out: given to a call that is traced or differentiated; expected none")
    return wanted
