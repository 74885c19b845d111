from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = [
    "AbortedError",
    "CapacityError",
    "CompilationError",
    "CudaError",
    "Dispatched",
    "Error",
    "ExpertParallel",
    "Group",
    "PeerTimeoutError",
    "Quantized",
    "Routing",
    "UnsupportedError",
    "check_groups",
    "dequantize",
    "gemm_bf16",
    "gemm_fp8",
    "grouped_gemm_bf16",
    "grouped_gemm_bf16_indexed",
    "grouped_gemm_bf16_masked",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_indexed",
    "grouped_gemm_fp8_masked",
    "grouped_gemm_fp8_swiglu",
    "grouped_wgrad_bf16",
    "grouped_wgrad_fp8",
    "permute",
    "quantize",
    "quantize_both",
    "quantize_transposed",
    "route",
    "route_and_permute",
    "swiglu_backward",
    "swiglu_backward_both",
    "swiglu_quantize",
    "swiglu_quantize_both",
    "unpermute",
    "unpermute_backward",
    "version",
    "wgrad_fp8",
]

ArrayT = TypeVar("ArrayT")

class Quantized(NamedTuple, Generic[ArrayT]):
    data: ArrayT
    scales: ArrayT

class Routing(NamedTuple, Generic[ArrayT]):
    counts: ArrayT
    offsets: ArrayT
    slots: ArrayT
    sources: ArrayT
    needed: ArrayT
    max_rows: int = 0

class Error(RuntimeError): ...
class UnsupportedError(Error): ...
class CompilationError(Error): ...
class CudaError(Error): ...
class PeerTimeoutError(Error): ...
class AbortedError(Error): ...
class CapacityError(Error): ...

__version__: str

def version() -> str: ...
def gemm_fp8(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    c: ArrayT | None = None,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    batch_invariant: bool = False,
    constant_b: bool = False,
) -> ArrayT: ...
def quantize(
    x: ArrayT,
    block: tuple[int, int] = (1, 128),
    pow2_scales: bool = False,
    out: Quantized[ArrayT] | tuple[ArrayT, ArrayT] | None = None,
) -> Quantized[ArrayT]: ...
def quantize_transposed(
    x: ArrayT, pow2_scales: bool = False, out: Quantized[ArrayT] | tuple[ArrayT, ArrayT] | None = None
) -> Quantized[ArrayT]: ...
def quantize_both(x: ArrayT, pow2_scales: bool = False) -> tuple[Quantized[ArrayT], Quantized[ArrayT]]: ...
def swiglu_quantize(
    x: ArrayT,
    weights: ArrayT | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    pow2_scales: bool = False,
    out: Quantized[ArrayT] | tuple[ArrayT, ArrayT] | None = None,
) -> Quantized[ArrayT]: ...
def swiglu_backward(
    grad: ArrayT,
    x: ArrayT,
    weights: ArrayT | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    out: ArrayT | None = None,
) -> tuple[ArrayT, ArrayT | None]: ...
def swiglu_quantize_both(
    x: ArrayT,
    weights: ArrayT | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    pow2_scales: bool = False,
) -> tuple[Quantized[ArrayT], Quantized[ArrayT]]: ...
def swiglu_backward_both(
    grad: ArrayT,
    x: ArrayT,
    weights: ArrayT | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    pow2_scales: bool = False,
) -> tuple[Quantized[ArrayT], Quantized[ArrayT]]: ...
def dequantize(
    q: Quantized[ArrayT] | tuple[ArrayT, ArrayT], out: ArrayT | None = None, dtype: Any = None
) -> ArrayT: ...
def grouped_gemm_fp8(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    offsets: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_gemm_fp8_indexed(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    row_groups: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_gemm_fp8_masked(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    counts: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_gemm_fp8_swiglu(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    offsets: ArrayT,
    weights: ArrayT | None = None,
    limit: float | None = None,
    pow2_scales: bool = False,
    out: Quantized[ArrayT] | tuple[ArrayT, ArrayT] | None = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    gates_and_ups: ArrayT | None = None,
    batch_invariant: bool = False,
) -> Quantized[ArrayT]: ...
def wgrad_fp8(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    out: ArrayT | None = None,
    accumulate: bool = False,
    num_sms: int = 0,
) -> ArrayT: ...
def grouped_wgrad_fp8(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    offsets: ArrayT,
    out: ArrayT | None = None,
    accumulate: bool = False,
    num_sms: int = 0,
) -> ArrayT: ...
def gemm_bf16(
    a: ArrayT,
    b: ArrayT,
    c: ArrayT | None = None,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_gemm_bf16(
    a: ArrayT,
    b: ArrayT,
    offsets: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_gemm_bf16_indexed(
    a: ArrayT,
    b: ArrayT,
    row_groups: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_gemm_bf16_masked(
    a: ArrayT,
    b: ArrayT,
    counts: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
    batch_invariant: bool = False,
) -> ArrayT: ...
def grouped_wgrad_bf16(
    a: ArrayT,
    b: ArrayT,
    offsets: ArrayT,
    out: ArrayT | None = None,
    accumulate: bool = False,
    num_sms: int = 0,
) -> ArrayT: ...
def check_groups(like: Any) -> None: ...
def route(
    topk_idx: ArrayT, num_experts: int, capacity: int | None = None, alignment: int = 1, max_rows: int = 0
) -> Routing[ArrayT]: ...
def permute(x: Any, routing: Routing[Any], out: Any = None, zero_padding: bool = True) -> Any: ...
def route_and_permute(
    x: Any,
    topk_idx: ArrayT,
    num_experts: int,
    capacity: int | None = None,
    alignment: int = 1,
    max_rows: int = 0,
    out: Any = None,
    zero_padding: bool = True,
) -> tuple[Any, Routing[ArrayT]]: ...
def unpermute(
    rows: ArrayT,
    routing: Routing[ArrayT],
    weights: ArrayT | None = None,
    residual: ArrayT | None = None,
    out: ArrayT | None = None,
    out_dtype: Any = None,
) -> ArrayT: ...
def unpermute_backward(
    grad_out: ArrayT,
    routing: Routing[ArrayT],
    weights: ArrayT | None = None,
    rows: ArrayT | None = None,
    rows_dtype: Any = None,
    zero_padding: bool = True,
) -> tuple[ArrayT, ArrayT | None]: ...

class Group:
    rank: int
    size: int
    device: str
    @staticmethod
    def local(devices: int | Sequence[Any], timeout: float = 30.0) -> list[Group]: ...
    @staticmethod
    def process(
        rank: int, size: int, device: Any, all_gather: Callable[[bytes], Sequence[bytes]], timeout: float = 30.0
    ) -> Group: ...
    @staticmethod
    def from_torch(process_group: Any = None, device: Any = None, timeout: float = 30.0) -> Group: ...
    @staticmethod
    def nccl(id: bytes, rank: int, size: int, device: Any, timeout: float = 30.0) -> Group: ...
    @staticmethod
    def from_nccl(comm: int, timeout: float = 30.0) -> Group: ...
    @staticmethod
    def nccl_id() -> bytes: ...
    def barrier(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...

class Dispatched(NamedTuple, Generic[ArrayT]):
    rows: ArrayT | Quantized[ArrayT]
    offsets: ArrayT
    counts: ArrayT
    row_weights: ArrayT
    handle: ArrayT

class ExpertParallel:
    group: Group
    hidden: int
    topk: int
    first_local_expert: int
    num_local_experts: int
    handle_words: int
    max_rows: int
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
    ) -> None: ...
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
    ) -> int: ...
    def dispatch(
        self,
        x: ArrayT | Quantized[ArrayT] | tuple[ArrayT, ArrayT],
        topk_idx: ArrayT | None = None,
        topk_weights: ArrayT | None = None,
        *,
        handle: ArrayT | None = None,
        capacity: int | None = None,
        quantize: bool = False,
        pow2_scales: bool = False,
        out: Dispatched[ArrayT] | None = None,
    ) -> Dispatched[ArrayT]: ...
    def dispatch_send(
        self,
        x: ArrayT | Quantized[ArrayT] | tuple[ArrayT, ArrayT],
        topk_idx: ArrayT | None = None,
        topk_weights: ArrayT | None = None,
        *,
        capacity: int | None,
        handle: ArrayT | None = None,
        quantize: bool = False,
        pow2_scales: bool = False,
        out: Dispatched[ArrayT] | None = None,
    ) -> Callable[[], Dispatched[ArrayT]]: ...
    def combine(
        self,
        rows: ArrayT,
        handle: ArrayT,
        *,
        tokens: int,
        residual: ArrayT | None = None,
        weighted: bool = True,
        out: ArrayT | None = None,
    ) -> ArrayT: ...
    def combine_send(
        self,
        rows: ArrayT,
        handle: ArrayT,
        *,
        tokens: int,
        residual: ArrayT | None = None,
        weighted: bool = True,
        out: ArrayT | None = None,
    ) -> Callable[[], ArrayT]: ...
    def combine_values(
        self, rows: ArrayT, row_values: ArrayT, handle: ArrayT, *, tokens: int, weighted: bool = True
    ) -> tuple[ArrayT, ArrayT]: ...
    def check(self) -> None: ...
    def close(self) -> None: ...
