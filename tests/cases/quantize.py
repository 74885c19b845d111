"""quantize and dequantize: exact to the bit, so the reference is the definition of docs/numerics.md in NumPy."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import phalanx

from cases.arrays import NUMPY_DTYPES, Guarded, NumPyArrays
from cases.shapes import BLOCK, num_blocks


def expand(scales: np.ndarray, rows: int, cols: int, block_rows: int) -> np.ndarray:
    """One scale per element."""
    return scales.repeat(block_rows, 0)[:rows].repeat(BLOCK, 1)[:, :cols]


def reference_quantize(x: np.ndarray, block_rows: int, pow2_scales: bool) -> tuple[np.ndarray, np.ndarray]:
    """Data E4M3 and scales FP32 of x, one scale per block_rows x 128."""
    rows, cols = x.shape
    x = x.astype(np.float32)
    finite = np.where(np.isfinite(x), np.abs(x), np.float32(0))
    padded = np.zeros((-(-rows // block_rows) * block_rows, num_blocks(cols) * BLOCK), np.float32)
    padded[:rows, :cols] = finite
    blocks = padded.reshape(padded.shape[0] // block_rows, block_rows, num_blocks(cols), BLOCK)
    amax = blocks.max((1, 3), initial=0)
    scales = np.maximum(amax / np.float32(448), np.float32(2.0**-126))
    if pow2_scales:
        scales = ((scales.view(np.uint32) + np.uint32(0x007FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        elements = np.clip(x * expand(np.float32(1) / scales, rows, cols, block_rows), -448, 448)
        data = elements.astype(ml_dtypes.float8_e4m3fn)
    data.view(np.uint8)[np.isnan(x)] = 0x7F
    return data, scales


def reference_dequantize(data: np.ndarray, scales: np.ndarray, dtype: str, block_rows: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        x = data.astype(np.float32) * expand(scales, *data.shape, block_rows)
        rounded = x.astype(NUMPY_DTYPES[dtype])
    bits = np.dtype(f"uint{8 * rounded.itemsize}")
    rounded.view(bits)[np.isnan(x)] = {2: 0x7FFF, 4: 0x7FFFFFFF}[rounded.itemsize]
    return rounded


def same_bytes(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    bits = np.dtype(f"uint{8 * expected.itemsize}")
    actual, expected = (np.ascontiguousarray(x).view(bits) for x in (actual, expected))
    bad = np.argwhere(actual != expected)
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise AssertionError(
            f"{what}: {len(bad)} of {expected.size} elements differ; the first, at {at}, is {actual[at]:#x}, "
            f"expected {expected[at]:#x}"
        )


def make_floats(rng: np.random.Generator, rows: int, cols: int, dtype: str, values: str) -> np.ndarray:
    if values == "bits":  # any bit pattern: NaNs, infinities and subnormals among them
        itemsize = NUMPY_DTYPES[dtype].itemsize
        return rng.integers(0, 256, (rows, cols * itemsize), np.uint8).view(NUMPY_DTYPES[dtype])
    x = rng.standard_normal((rows, cols), np.float32) * np.exp2(rng.integers(-9, 9, (rows, 1))).astype(np.float32)
    if values == "edges":
        special = [np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, 448, 464, 2.0**-6, 2.0**-10, 1e-40, 65504, 3e38, -3e38]
        where = rng.random((rows, cols)) < 0.05
        x[where] = rng.choice(np.array(special, np.float32), int(where.sum()))
        for block in range(0, cols, 3 * BLOCK):  # all-zero, all-subnormal, all-NaN blocks
            x[rows // 4 : rows // 2, block : block + BLOCK] = 0
            x[rows // 2 : rows // 2 + rows // 8, block : block + BLOCK] *= np.float32(1e-42)
            x[rows - rows // 8 :, block : block + BLOCK] = np.nan
    with np.errstate(over="ignore"):
        return x.astype(NUMPY_DTYPES[dtype])


@dataclass
class QuantizeInputs:
    arrays: NumPyArrays
    x: Guarded
    data: Guarded
    scales: Guarded


@dataclass(frozen=True)
class QuantizeCase:
    rows: int
    cols: int
    dtype: str = "bf16"
    block_rows: int = 1
    pow2_scales: bool = False
    scales_layout: str = "mn"  # mn or k: which stride is 1
    pad: int = 0  # further elements at the end of the rows of x and data
    values: str = "normal"  # normal, edges or bits
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        pow2 = "-pow2" if self.pow2_scales else ""
        return (
            f"{self.rows}x{self.cols}-{self.dtype}-by{self.block_rows}{pow2}-{self.scales_layout}-pad{self.pad}"
            f"-{self.values}-seed{self.seed}"
        )

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.cols

    @property
    def bytes(self) -> int:
        scales = -(-self.rows // self.block_rows) * num_blocks(self.cols)
        return self.rows * self.cols * (NUMPY_DTYPES[self.dtype].itemsize + 1) + 4 * scales

    def make(self, arrays: NumPyArrays) -> QuantizeInputs:
        rng = np.random.default_rng([self.seed, self.rows, self.cols])
        values = make_floats(rng, self.rows, self.cols, self.dtype, self.values)
        scale_rows = -(-self.rows // self.block_rows)
        stride = self.cols + self.pad
        x = arrays.matrix(self.rows, self.cols, self.dtype, stride)
        return QuantizeInputs(
            arrays,
            arrays.copy_in(x, values),
            arrays.matrix(self.rows, self.cols, "e4m3", stride),
            arrays.matrix(scale_rows, num_blocks(self.cols), "f32", by_columns=self.scales_layout == "mn"),
        )

    def run(self, inputs: QuantizeInputs) -> Any:
        out = (inputs.data.array, inputs.scales.array)
        return phalanx.quantize(inputs.x.array, (self.block_rows, BLOCK), self.pow2_scales, out=out)

    def reference(self, inputs: QuantizeInputs) -> tuple[np.ndarray, np.ndarray]:
        return reference_quantize(inputs.arrays.to_numpy(inputs.x.array), self.block_rows, self.pow2_scales)

    def check(self, inputs: QuantizeInputs) -> None:
        data, scales = self.reference(inputs)
        same_bytes(f"{self}: scales", inputs.arrays.to_numpy(inputs.scales.array), scales)
        same_bytes(f"{self}: data", inputs.arrays.to_numpy(inputs.data.array), data)
        inputs.data.check_guard()
        inputs.scales.check_guard()


@dataclass
class TransposedInputs:
    arrays: NumPyArrays
    x: Guarded
    data: Guarded  # transposed
    scales: Guarded


@dataclass(frozen=True)
class TransposedCase:
    """quantize_transposed, and quantize_both, which must give the same and the rows as well."""

    rows: int
    cols: int
    dtype: str = "bf16"
    pow2_scales: bool = False
    scales_layout: str = "mn"
    pad: int = 0
    values: str = "normal"
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        pow2 = "-pow2" if self.pow2_scales else ""
        return (
            f"transposed-{self.rows}x{self.cols}-{self.dtype}{pow2}-{self.scales_layout}-pad{self.pad}-{self.values}"
            f"-seed{self.seed}"
        )

    def make(self, arrays: NumPyArrays) -> TransposedInputs:
        rng = np.random.default_rng([self.seed, self.rows, self.cols])
        values = make_floats(rng, self.rows, self.cols, self.dtype, self.values)
        x = arrays.matrix(self.rows, self.cols, self.dtype, self.cols + self.pad)
        by_columns = self.scales_layout == "mn"
        return TransposedInputs(
            arrays,
            arrays.copy_in(x, values),
            arrays.matrix(self.cols, self.rows, "e4m3", self.rows + self.pad),
            arrays.matrix(self.cols, num_blocks(self.rows), "f32", by_columns=by_columns),
        )

    def run(self, inputs: TransposedInputs) -> Any:
        out = (inputs.data.array, inputs.scales.array)
        phalanx.quantize_transposed(inputs.x.array, self.pow2_scales, out=out)
        return phalanx.quantize_both(inputs.x.array, self.pow2_scales)

    def check(self, inputs: TransposedInputs, both: Any) -> None:
        to_numpy = inputs.arrays.to_numpy
        x = to_numpy(inputs.x.array)
        rows, transposed = (reference_quantize(y, 1, self.pow2_scales) for y in (x, np.ascontiguousarray(x.T)))
        results = {
            "transposed": ((inputs.data.array, inputs.scales.array), transposed),
            "both, rows": (both[0], rows),
            "both, transposed": (both[1], transposed),
        }
        for name, (actual, expected) in results.items():
            same_bytes(f"{self}: {name}: scales", to_numpy(actual[1]), expected[1])
            same_bytes(f"{self}: {name}: data", to_numpy(actual[0]), expected[0])
        inputs.data.check_guard()
        inputs.scales.check_guard()


@dataclass
class DequantizeInputs:
    arrays: NumPyArrays
    data: Guarded
    scales: Guarded
    x: Guarded


@dataclass(frozen=True)
class DequantizeCase:
    """From any E4M3, NaN included, with scales over the whole range of FP32."""

    rows: int
    cols: int
    dtype: str = "bf16"
    block_rows: int = 1
    scales_layout: str = "mn"
    pad: int = 0
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}-{self.dtype}-by{self.block_rows}-{self.scales_layout}-seed{self.seed}"

    @property
    def flops(self) -> int:
        return self.rows * self.cols

    @property
    def bytes(self) -> int:
        scales = -(-self.rows // self.block_rows) * num_blocks(self.cols)
        return self.rows * self.cols * (NUMPY_DTYPES[self.dtype].itemsize + 1) + 4 * scales

    def make(self, arrays: NumPyArrays) -> DequantizeInputs:
        rng = np.random.default_rng([self.seed, self.rows, self.cols])
        shape = (-(-self.rows // self.block_rows), num_blocks(self.cols))
        scales = np.exp2(rng.uniform(-126, 119, shape)).astype(np.float32)
        near_one = rng.random(shape) < 0.5
        scales[near_one] = np.exp2(rng.uniform(-20, 8, shape)).astype(np.float32)[near_one]
        data = rng.integers(0, 256, (self.rows, self.cols), np.uint8).view(ml_dtypes.float8_e4m3fn)
        stride = self.cols + self.pad
        by_columns = self.scales_layout == "mn"
        return DequantizeInputs(
            arrays,
            arrays.copy_in(arrays.matrix(self.rows, self.cols, "e4m3", stride), data),
            arrays.copy_in(arrays.matrix(*shape, "f32", by_columns=by_columns), scales),
            arrays.matrix(self.rows, self.cols, self.dtype, stride),
        )

    def run(self, inputs: DequantizeInputs) -> Any:
        return phalanx.dequantize((inputs.data.array, inputs.scales.array), out=inputs.x.array)

    def reference(self, inputs: DequantizeInputs) -> np.ndarray:
        to_numpy = inputs.arrays.to_numpy
        return reference_dequantize(
            to_numpy(inputs.data.array), to_numpy(inputs.scales.array), self.dtype, self.block_rows
        )

    def check(self, inputs: DequantizeInputs) -> None:
        same_bytes(str(self), inputs.arrays.to_numpy(inputs.x.array), self.reference(inputs))
        inputs.x.check_guard()
