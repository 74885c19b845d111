"""What the cases need of an array library, twice: NumPy, and PyTorch on any device.

Every matrix is guarded: it lies in larger memory that is poisoned with 0xff bytes, a NaN in each of our formats. A
kernel that reads outside its operand gets NaN into its result; one that writes outside its output breaks the poison.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

POISON = 0xFF
GUARD_ROWS = 3

NUMPY_DTYPES = {
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}


@dataclass
class Guarded:
    """A matrix in poisoned memory."""

    array: Any
    memory: Any  # uint8 [rows + 2 * GUARD_ROWS, row stride in bytes]; of a column-major matrix, the transpose's
    rows: int
    row_bytes: int
    by_columns: bool

    def inside(self, memory: Any) -> Any:
        return memory[GUARD_ROWS : GUARD_ROWS + self.rows, : self.row_bytes]

    def check_guard(self) -> None:
        """Nothing outside the matrix was written."""
        outside = self.memory + 0
        self.inside(outside)[...] = POISON
        assert bool((outside == POISON).all()), "memory outside the output was written"


class NumPyArrays:
    """NumPy and ml_dtypes."""

    device = "cpu"
    xp = np

    def dtype(self, name: str) -> Any:
        return NUMPY_DTYPES[name]

    def _poisoned(self, rows: int, row_bytes: int) -> Any:
        return np.full((rows, row_bytes), POISON, np.uint8)

    def matrix(self, rows: int, cols: int, dtype: str, stride: int | None = None, by_columns: bool = False) -> Guarded:
        """A new poisoned matrix. `stride` is in elements, by default the next multiple of 16 bytes."""
        itemsize = NUMPY_DTYPES[dtype].itemsize
        if by_columns:
            rows, cols = cols, rows
        stride = stride or max(1, -(-cols * itemsize // 16)) * 16 // itemsize
        memory = self._poisoned(rows + 2 * GUARD_ROWS, stride * itemsize)
        array = memory[GUARD_ROWS : GUARD_ROWS + rows].view(self.dtype(dtype))[:, :cols]
        return Guarded(array.T if by_columns else array, memory, rows, cols * itemsize, by_columns)

    def copy_in(self, matrix: Guarded, values: np.ndarray) -> Guarded:
        """Fills a matrix from one of NumPy, of the same dtype, and returns it."""
        values = np.ascontiguousarray(values.T if matrix.by_columns else values)
        matrix.inside(matrix.memory)[...] = self._from_numpy(values.view(np.uint8))
        return matrix

    def _from_numpy(self, values: np.ndarray) -> Any:
        return values

    def integers(self, values: Any) -> Any:
        """A vector of int32."""
        return self._from_numpy(np.array(values, np.int32))

    def to_numpy(self, array: Any) -> np.ndarray:
        return array

    def f64(self, array: Any) -> Any:
        return array.astype(np.float64)

    def rounded(self, array: Any, dtype: str) -> Any:
        """FP64 values that fit in FP32, rounded once."""
        return array.astype(np.float32).astype(self.dtype(dtype)).astype(np.float64)

    def arange(self, n: int) -> Any:
        return np.arange(n)


class TorchArrays(NumPyArrays):
    """PyTorch, on "cpu" or "cuda"."""

    def __init__(self, device: str):
        import torch

        self.xp, self.place, self.device = torch, device, torch.device(device).type
        self.dtypes = {
            "e4m3": torch.float8_e4m3fn,
            "bf16": torch.bfloat16,
            "f16": torch.float16,
            "f32": torch.float32,
        }

    def dtype(self, name: str) -> Any:
        return self.dtypes[name]

    def _poisoned(self, rows: int, row_bytes: int) -> Any:
        return self.xp.full((rows, row_bytes), POISON, dtype=self.xp.uint8, device=self.place)

    def _from_numpy(self, values: np.ndarray) -> Any:
        return self.xp.from_numpy(values).to(self.place)

    def to_numpy(self, array: Any) -> np.ndarray:
        name = next(name for name, dtype in self.dtypes.items() if dtype == array.dtype)
        bits = {1: self.xp.uint8, 2: self.xp.int16, 4: self.xp.int32}[array.dtype.itemsize]
        return array.cpu().view(bits).numpy().view(NUMPY_DTYPES[name])

    def f64(self, array: Any) -> Any:
        return array.double()

    def rounded(self, array: Any, dtype: str) -> Any:
        return array.float().to(self.dtype(dtype)).double()

    def arange(self, n: int) -> Any:
        return self.xp.arange(n, device=self.place)
