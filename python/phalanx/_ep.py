"""Expert parallelism: tokens go to the ranks that hold their experts, and come back summed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from phalanx import _api, _frameworks, _native
from phalanx._api import Quantized
from phalanx._frameworks.base import Framework, check_count, shape_of
from phalanx._group import Group, Owner

_BOTH, _SEND, _RECV = range(3)


class Dispatched(NamedTuple):
    """The rows of this rank's experts, in order of (local expert, source rank, source token).

    rows:         [R, H] BF16, or a Quantized of E4M3 with MN-major scales, as `grouped_gemm_fp8` reads them best
    offsets:      int32 [local experts + 1], where each expert's rows begin; R >= offsets[-1]
    counts:       int32 [local experts], rows without padding
    row_weights:  FP32 [R], the topk_weights of each row; 0 for padding
    handle:       int32, for `combine`, and for dispatches with the same routing

    Rows from offsets[-1] on, with a capacity, are as `out` had them: without one whatever the memory held, NaN perhaps.
    Only `phalanx.torch_ep.dispatch` makes them, and their row_weights, 0.
    """

    rows: Any
    offsets: Any
    counts: Any
    row_weights: Any
    handle: Any


class ExpertParallel(Owner):
    """Dispatch and combine over a group. Collective, as all of its calls: made alike on every rank, in the same order.

    hidden:            H; rows are a multiple of 16 bytes
    num_experts:       of all ranks; rank r holds neighbouring ones
    topk:              K, 1 to 32
    max_tokens:        of any rank in any call
    dtype:             the widest that is sent: "e4m3" (half the memory) or "bf16"
    latency:           few tokens: two buffers in turn, tokens spread over all warps
    num_sms:           SMs of a call; 0: 32, or 128 for latency
    alignment:         each expert's rows begin at a multiple of this
    experts_per_rank:  a number for each rank; by default as even as can be

    On CUDA, `dispatch` with a capacity, and `combine`, only enqueue work, and can be captured in CUDA graphs; what goes
    wrong there is raised by a later call, or by `check` after a synchronisation.
    """

    def __init__(
        self,
        group: Group,
        *,
        hidden: int,
        num_experts: int,
        topk: int,
        max_tokens: int,
        dtype: str = "e4m3",
        latency: bool = False,
        num_sms: int = 0,
        alignment: int = 1,
        experts_per_rank: Sequence[int] | None = None,
    ):
        self.group, self.hidden, self.topk, self._latency = group, hidden, topk, latency
        config = _config(hidden, num_experts, topk, max_tokens, dtype, latency, num_sms, alignment, experts_per_rank)
        self._number = _native.ep_create(group._number, *config)
        self.first_local_expert, self.num_local_experts, self.handle_words, self.max_rows = _native.ep_info(
            self._number
        )

    @staticmethod
    def buffer_bytes(
        num_ranks: int,
        *,
        hidden: int,
        num_experts: int,
        topk: int,
        max_tokens: int,
        dtype: str = "e4m3",
        latency: bool = False,
        num_sms: int = 0,
        experts_per_rank: Sequence[int] | None = None,
    ) -> int:
        """Bytes that an ExpertParallel takes on each rank with a GPU; include/phalanx/ep.h has the formula."""
        config = _config(hidden, num_experts, topk, max_tokens, dtype, latency, num_sms, 1, experts_per_rank)
        return _native.ep_bytes(num_ranks, *config)

    # --- dispatch -----------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        *,
        handle: Any = None,
        capacity: int | None = None,
        quantize: bool = False,
        pow2_scales: bool = False,
        out: Dispatched | None = None,
    ) -> Dispatched:
        """Tokens to the rows of their experts.

        x:             [T, H] BF16, or Quantized or (data, scales) of E4M3 (not JAX, which has no MN-major scales)
        topk_idx:      int32 or int64 [T, K]; outside [0, num_experts), -1 say: no expert
        topk_weights:  FP32 [T, K], for `combine`; by default 1
        handle:        instead of topk_idx and topk_weights: an earlier dispatch's routing; the result has this handle
        capacity:      rows that the result has room for; nothing waits then, and what exceeds it is dropped, and raised
                       as CapacityError. By default exactly as many as there are, which on CUDA one read waits for
        quantize:      send BF16 x as E4M3, quantised on the way with `latency`, else before, by `phalanx.quantize`
        out:           where to write; its offsets, counts and row_weights too, and its handle if none is given

        Rows are x to the bit, but that with few tokens on CUDA a NaN may lose its sign.
        """
        _check_out(out, quantize, capacity)
        x = self._as_sent(x, quantize, pow2_scales, out)
        return self._dispatch(x, topk_idx, topk_weights, handle, capacity, quantize, pow2_scales, out, _BOTH)

    def dispatch_send(
        self, x, topk_idx=None, topk_weights=None, *, capacity, handle=None, quantize=False, pow2_scales=False, out=None
    ) -> Callable[[], Dispatched]:
        """The first half of `dispatch`; what it returns is the second, before which its arguments must not change.

        Two may be under way (without `latency`: one), but no whole `dispatch` meanwhile.

        With a capacity of None, and neither handle nor out, this half waits for the peers' routing.
        """
        _check_out(out, quantize, capacity)
        x = self._as_sent(x, quantize, pow2_scales, out)
        result = self._dispatch(x, topk_idx, topk_weights, handle, capacity, quantize, pow2_scales, out, _SEND)
        if capacity is None and out is None:  # the routing has gone ahead, and the tokens by its handle
            topk_idx, topk_weights, handle = None, None, result.handle
        options = handle, capacity, quantize, pow2_scales, result
        return lambda: self._dispatch(x, topk_idx, topk_weights, *options, _RECV)

    def _as_sent(self, x, quantize, pow2_scales, out):
        """With many tokens a kernel that quantises each once is quicker than dispatch, which would for each place."""
        quantize = quantize or (out is not None and isinstance(out.rows, (tuple, list)))
        if self._latency or not quantize or isinstance(x, (tuple, list)):
            return x
        return _api.quantize(x, pow2_scales=pow2_scales) if x.dtype == _frameworks.of(x, "x").bf16 else x

    def _dispatch(self, x, topk_idx, topk_weights, handle, capacity, quantize, pow2_scales, out, part):
        quantized = isinstance(x, (tuple, list))
        data, scales = _api.as_pair(x=x) if quantized else (x, None)
        framework = _frameworks.of(data, "x")
        if (topk_idx is None) == (handle is None):
            raise ValueError("topk_idx, handle: expected one of the two")
        if capacity is not None:
            check_count("capacity", capacity)
        view, writable = framework.view, framework.writable_view
        optional = lambda array: None if array is None else view(array)  # noqa: E731
        routing = optional(topk_idx), optional(topk_weights)
        stream = framework.stream(data)
        as_handle = writable if handle is None else view  # an earlier dispatch's is only read
        if out is None:
            offsets = _vector(framework, self.num_local_experts + 1, framework.i32, data)
            counts = _vector(framework, self.num_local_experts, framework.i32, data)
            if handle is None:
                handle = _vector(framework, self.handle_words, framework.i32, data)
                if capacity is None:  # the routing goes ahead of x
                    if shape_of("topk_idx", topk_idx)[:1] != shape_of("x", data)[:1]:
                        raise ValueError(f"topk_idx: {len(topk_idx)} tokens; expected {len(data)}, those of x")
                    nothing = None, None, None
                    _native.ep_dispatch(
                        self._number, None, None, *routing, writable(handle), *nothing, None, None, False, _BOTH, stream
                    )
                    routing = None, None
            if capacity is None:
                capacity = _native.ep_num_rows(self._number, view(handle), stream)
            weights = _vector(framework, capacity, framework.f32, data)
            rows = self._empty_rows(framework, capacity, quantize or quantized, data)
            out = Dispatched(rows, offsets, counts, weights, handle)
        elif handle is not None:
            out = out._replace(handle=handle)
        rows, row_scales = out.rows if isinstance(out.rows, (tuple, list)) else (out.rows, None)
        _native.ep_dispatch(
            self._number,
            view(data),
            optional(scales),
            *routing,
            as_handle(out.handle),
            writable(rows),
            None if row_scales is None else writable(row_scales),
            writable(out.row_weights),
            writable(out.offsets),
            writable(out.counts),
            pow2_scales,
            part,
            stream,
        )
        framework.finish(data)
        return out

    def _empty_rows(self, framework: Framework, rows: int, quantized: bool, like: Any) -> Any:
        if not quantized:
            return framework.empty_rows(rows, self.hidden, framework.bf16, like)
        return Quantized(*framework.empty_quantized(rows, self.hidden, False, like))

    # --- combine ------------------------------------------------------------------------------------------------------

    def combine(
        self, rows: Any, handle: Any, *, tokens: int, residual: Any = None, weighted: bool = True, out: Any = None
    ) -> Any:
        """out[t] = sum over t's choices of topk_weights * its row + residual[t]: BF16 [T, H], back on t's rank.

        rows:      BF16 [R, H], as `dispatch` ordered them
        tokens:    T of the dispatch
        residual:  BF16 [T, H]; may be `out`
        weighted:  False: weights of 1, the gradient of `dispatch`

        Each rank sums in FP32 in the order of choices; others' sums come as BF16, and are added in FP32 in the order of
        ranks.
        """
        if out is not None:
            _frameworks.of(rows, "rows").check_out(out, None)
        return self._combine(rows, handle, tokens, residual, weighted, None, out, _BOTH)[0]

    def combine_send(self, rows, handle, *, tokens, residual=None, weighted=True, out=None) -> Callable[[], Any]:
        """The first half of `combine`; what it returns is the second, before which its arguments must not change."""
        options = handle, tokens, residual, weighted, None
        if out is not None:
            _frameworks.of(rows, "rows").check_out(out, None)
        out, _ = self._combine(rows, *options, out, _SEND)
        return lambda: self._combine(rows, *options, out, _RECV)[0]

    def combine_values(self, rows, row_values, handle, *, tokens, weighted=True) -> tuple[Any, Any]:
        """`combine`, and one number a row taken home as it is: FP32 [T, K] from row_values FP32 [R], 0 for no row."""
        return self._combine(rows, handle, tokens, None, weighted, row_values, None, _BOTH)

    def _combine(self, rows, handle, tokens, residual, weighted, row_values, out, part):
        framework = _frameworks.of(rows, "rows")
        check_count("tokens", tokens)
        if out is None:
            out = framework.empty_rows(tokens, self.hidden, framework.bf16, rows)
        values = None
        if row_values is not None:
            values = framework.empty((tokens, self.topk), (self.topk, 1), framework.f32, rows)
        view, writable = framework.view, framework.writable_view
        _native.ep_combine(
            self._number,
            view(rows),
            view(handle),
            writable(out),
            None if residual is None else view(residual),
            weighted,
            None if row_values is None else view(row_values),
            None if values is None else writable(values),
            part,
            framework.stream(rows),
        )
        framework.finish(rows)
        return out, values

    def check(self) -> None:
        """Raises what went wrong in operations that have finished on the device."""
        _native.ep_check(self._number)

    def close(self) -> None:
        """Frees the symmetric memory, of local groups with the last rank's; further calls raise AbortedError.

        Synchronise every rank's streams and pass `group.barrier()` before: peers' last kernels may still write to it.
        """
        _native.ep_release(self._number)

    def __del__(self):
        if hasattr(self, "_number"):
            self.close()


def _config(hidden, num_experts, topk, max_tokens, dtype, latency, num_sms, alignment, experts_per_rank) -> tuple:
    if dtype not in ("e4m3", "bf16"):
        raise ValueError(f"dtype: {dtype!r}; expected 'e4m3' or 'bf16'")
    experts = tuple(experts_per_rank or ())
    return hidden, num_experts, topk, max_tokens, dtype == "bf16", latency, num_sms, alignment, experts


def _check_out(out: Dispatched | None, quantize: bool, capacity: int | None) -> None:
    """It may be written, and has rows as the other arguments want them."""
    if out is None:
        return
    rows = out.rows if isinstance(out.rows, (tuple, list)) else (out.rows,)
    for array in (*rows, out.offsets, out.counts, out.row_weights, out.handle):
        _frameworks.of(array, "out").check_out(array, None)
    if quantize and not isinstance(out.rows, (tuple, list)):
        raise ValueError("quantize: True; expected False, as out.rows are BF16")
    rows = len(out.row_weights)
    if capacity is not None and capacity != rows:
        raise ValueError(f"capacity: {capacity}; expected {rows}, the rows of out, or none")


def _vector(framework: Framework, length: int, dtype: Any, like: Any) -> Any:
    return framework.empty((length,), (1,), dtype, like)
