"""NumPy with ml_dtypes, on the CPU."""

from functools import cache
from typing import Any

import numpy as np
import tvm_ffi

from phalanx import _native
from phalanx._frameworks import by_type
from phalanx._frameworks.base import Framework, foreign

_CPU = tvm_ffi.device("cpu")


def ml_dtypes() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("NumPy's E4M3 and BF16 are those of ml_dtypes: pip install ml_dtypes") from None
    return ml_dtypes


@cache
def ffi_dtype(dtype: np.dtype) -> tvm_ffi.dtype:
    try:
        if not dtype.isnative:
            raise ValueError
        return tvm_ffi.dtype(dtype.name)
    except ValueError:
        raise TypeError(
            f"dtype {dtype!r} is not supported; expected float8_e4m3fn, bfloat16, float16 or float32"
        ) from None


def itemsize_of(dtype: Any) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        raise TypeError(f"dtype: {dtype!r}; expected one that NumPy knows") from None


def element_strides(array: Any) -> tuple[int, ...]:
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(f"strides {array.strides} (bytes); expected multiples of the {array.itemsize}-byte elements")
    return tuple(stride // array.itemsize for stride in array.strides)


def view_or_reason(address: int, array: Any, device: Any, dtype: Any = None, strides: Any = None) -> Any:
    """A view of what lies at `address`; or why there is none, for the module to say: it knows the argument's name."""
    try:
        strides = element_strides(array) if strides is None else strides
        return _native.view(address, dtype or ffi_dtype(array.dtype), array.shape, strides, device)
    except (TypeError, ValueError) as reason:
        return type(reason).__name__, str(reason)


def num_elements(shape: tuple[int, int], strides: tuple[int, int]) -> int:
    return max(n * stride for n, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


class NumPy(Framework):
    f32 = np.dtype(np.float32)
    i32 = np.dtype(np.int32)

    @property
    def e4m3(self):
        return np.dtype(ml_dtypes().float8_e4m3fn)

    @property
    def bf16(self):
        return np.dtype(ml_dtypes().bfloat16)

    def itemsize(self, dtype):
        return itemsize_of(dtype)

    def empty(self, shape, strides, dtype, like):
        memory = np.empty(num_elements(shape, strides), dtype)
        return np.ndarray(shape, dtype, memory, strides=[stride * memory.itemsize for stride in strides])

    def view(self, array):
        if not isinstance(array, np.ndarray):
            return foreign(array, "NumPy")  # the module names the argument
        # Not __dlpack__: it knows neither E4M3 nor BF16, and refuses read-only memory, such as mapped weights.
        address = array.__array_interface__["data"][0]
        return view_or_reason(address, array, _CPU)

    def check_writable(self, name, array):
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError(f"{name}: a read-only array; expected a writable one")

    def writable_view(self, array):
        self.check_writable("out", array)
        return self.view(array)


framework = NumPy()
by_type[np.ndarray] = framework
