from typing import Any, Generic, NamedTuple, TypeVar

__all__ = [
    "CompilationError",
    "CudaError",
    "Error",
    "Quantized",
    "Routing",
    "UnsupportedError",
    "check_groups",
    "dequantize",
    "gemm_fp8",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_indexed",
    "grouped_gemm_fp8_masked",
    "grouped_wgrad_fp8",
    "permute",
    "quantize",
    "quantize_both",
    "quantize_transposed",
    "route",
    "route_and_permute",
    "swiglu_backward",
    "swiglu_quantize",
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
) -> ArrayT: ...
def grouped_gemm_fp8_indexed(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    row_groups: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
) -> ArrayT: ...
def grouped_gemm_fp8_masked(
    a: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    b: Quantized[ArrayT] | tuple[ArrayT, ArrayT],
    counts: ArrayT,
    out: ArrayT | None = None,
    out_dtype: Any = None,
    num_sms: int = 0,
    expected_rows: int = 0,
) -> ArrayT: ...
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
