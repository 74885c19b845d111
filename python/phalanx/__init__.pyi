from typing import Any, Generic, NamedTuple, TypeVar

__all__ = [
    "CompilationError",
    "CudaError",
    "Error",
    "Quantized",
    "UnsupportedError",
    "dequantize",
    "gemm_fp8",
    "quantize",
    "version",
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
