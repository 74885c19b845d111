from typing import Any, Generic, NamedTuple, TypeVar

__all__ = [
    "CompilationError",
    "CudaError",
    "Error",
    "Quantized",
    "UnsupportedError",
    "check_groups",
    "dequantize",
    "gemm_fp8",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_indexed",
    "grouped_gemm_fp8_masked",
    "grouped_wgrad_fp8",
    "quantize",
    "version",
    "wgrad_fp8",
]

ArrayT = TypeVar("ArrayT")

class Quantized(NamedTuple, Generic[ArrayT]):
    data: ArrayT
    scales: ArrayT

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
