"""SwiGLU with quantisation, and its gradients, against FP64. The bounds are those of docs/numerics.md."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import phalanx

from cases.arrays import NUMPY_DTYPES, Guarded, NumPyArrays
from cases.quantize import expand, make_floats, same_bytes
from cases.shapes import num_blocks

HALF_ULP = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24}
SMALLEST = {"bf16": 2.0**-133, "f16": 2.0**-24, "f32": 2.0**-149}  # subnormals


@dataclass
class SwigluInputs:
    arrays: NumPyArrays
    x: Guarded
    grad: Guarded
    weights: Guarded | None
    data: Guarded
    scales: Guarded
    grad_x: Guarded


@dataclass
class Parts:
    """In FP64, each [M, I]: what SwiGLU consists of."""

    gate: np.ndarray
    up: np.ndarray
    sigmoid: np.ndarray
    weight: np.ndarray
    gate_cut: np.ndarray
    up_cut: np.ndarray

    @property
    def silu(self) -> np.ndarray:
        return self.gate * self.sigmoid

    @property
    def h(self) -> np.ndarray:
        return self.silu * self.up * self.weight

    @property
    def error(self) -> np.ndarray:
        """Of the sigmoid, relative."""
        return 4e-7 + 1.5e-8 * np.abs(self.gate)


@dataclass(frozen=True)
class SwigluCase:
    rows: int
    cols: int  # I
    dtype: str = "bf16"
    interleaved: bool = False
    limit: float | None = None
    weighted: bool = False
    pow2_scales: bool = False
    scales_layout: str = "mn"
    pad: int = 0  # further elements at the end of every matrix's rows
    values: str = "normal"  # normal, or bits: anything, for comparisons of bytes only
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("interleaved", "weighted", "pow2_scales") if getattr(self, name))
        return (
            f"swiglu-{self.rows}x{self.cols}-{self.dtype}{flags}-limit{self.limit}-{self.scales_layout}-pad{self.pad}"
            f"-{self.values}-seed{self.seed}"
        )

    @property
    def bytes(self) -> int:
        """The least that must move, forward."""
        elements = self.rows * self.cols * (2 * NUMPY_DTYPES[self.dtype].itemsize + 1)
        return elements + 4 * self.rows * num_blocks(self.cols)

    @property
    def backward_bytes(self) -> int:
        return self.rows * self.cols * 5 * NUMPY_DTYPES[self.dtype].itemsize

    def make(self, arrays: NumPyArrays) -> SwigluInputs:
        rng = np.random.default_rng([self.seed, self.rows, self.cols])

        def filled(cols: int) -> Guarded:
            values = make_floats(rng, self.rows, cols, self.dtype, self.values)
            return arrays.copy_in(arrays.matrix(self.rows, cols, self.dtype, cols + self.pad), values)

        weights = None
        if self.weighted:
            values = rng.uniform(-1, 2, (1, self.rows)).astype(np.float32)
            weights = arrays.copy_in(arrays.matrix(1, self.rows, "f32"), values)
        return SwigluInputs(
            arrays,
            filled(2 * self.cols),
            filled(self.cols),
            weights,
            arrays.matrix(self.rows, self.cols, "e4m3", self.cols + self.pad),
            arrays.matrix(self.rows, num_blocks(self.cols), "f32", by_columns=self.scales_layout == "mn"),
            arrays.matrix(self.rows, 2 * self.cols, self.dtype, 2 * self.cols + self.pad),
        )

    def run(self, inputs: SwigluInputs) -> Any:
        """Forward and backward. Returns the gradient of the weights."""
        weights = None if inputs.weights is None else inputs.weights.array[0]
        options = (weights, self.limit, self.interleaved)
        out = (inputs.data.array, inputs.scales.array)
        phalanx.swiglu_quantize(inputs.x.array, *options, self.pow2_scales, out=out)
        return phalanx.swiglu_backward(inputs.grad.array, inputs.x.array, *options, out=inputs.grad_x.array)[1]

    def check_both(self, inputs: SwigluInputs) -> None:
        """swiglu_quantize_both and swiglu_backward_both give what their parts give. After `run`; BF16 only."""
        weights = None if inputs.weights is None else inputs.weights.array[0]
        options = (weights, self.limit, self.interleaved, self.pow2_scales)
        to_numpy = inputs.arrays.to_numpy
        rows, transposed = phalanx.swiglu_quantize_both(inputs.x.array, *options)
        same_bytes(f"{self}: rows", to_numpy(rows.data), to_numpy(inputs.data.array))
        same_bytes(f"{self}: scales of rows", to_numpy(rows.scales), to_numpy(inputs.scales.array))
        if self.values == "normal":
            values = to_numpy(phalanx.dequantize(transposed)).astype(np.float64).T
            scales = to_numpy(transposed.scales).astype(np.float64).T
            each = expand(np.ascontiguousarray(scales.T), self.cols, self.rows, 1).T
            h = self.parts(inputs).h
            bound = np.maximum(np.abs(h) * 2.0**-4, each * 2.0**-10) * (1 + 2.0**-12) + np.abs(h) * 3e-6 + 2.0**-120
            within(f"{self}: transposed", values, h, bound)
        if self.cols % 8:
            return
        pairs = (
            phalanx.swiglu_backward_both(inputs.grad.array, inputs.x.array, *options),
            phalanx.quantize_both(inputs.grad_x.array, self.pow2_scales),
        )
        for actual, expected in zip(*pairs, strict=True):
            for a, b in zip(actual, expected, strict=True):
                same_bytes(f"{self}: gradients", to_numpy(a), to_numpy(b))

    def split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gate and up."""
        if not self.interleaved:
            return x[:, : self.cols], x[:, self.cols :]
        pairs = x.reshape(self.rows, self.cols // 8, 2, 8)
        return tuple(pairs[:, :, i].reshape(self.rows, self.cols) for i in (0, 1))

    def parts(self, inputs: SwigluInputs) -> Parts:
        gate, up = (half.astype(np.float64) for half in self.split(inputs.arrays.to_numpy(inputs.x.array)))
        limit = np.inf if self.limit is None else float(np.float32(self.limit))
        weight = np.ones((self.rows, 1))
        if inputs.weights is not None:
            weight = inputs.arrays.to_numpy(inputs.weights.array).astype(np.float64).T
        cut = np.maximum(np.minimum(gate, limit), -80)
        return Parts(cut, np.clip(up, -limit, limit), 1 / (1 + np.exp(-cut)), weight, gate > limit, np.abs(up) > limit)

    def check(self, inputs: SwigluInputs, grad_weights: Any) -> None:
        parts = self.parts(inputs)
        self._check_result(inputs, parts)
        self._check_gradients(inputs, parts)
        if grad_weights is not None:
            self._check_weights(inputs, parts, inputs.arrays.to_numpy(grad_weights))
        for matrix in (inputs.data, inputs.scales, inputs.grad_x):
            matrix.check_guard()

    def _check_result(self, inputs: SwigluInputs, parts: Parts) -> None:
        data = inputs.arrays.to_numpy(inputs.data.array).astype(np.float64)
        scales = inputs.arrays.to_numpy(inputs.scales.array).astype(np.float64)
        h, slack = parts.h, np.abs(parts.h) * (parts.error + 3e-7) + 2.0**-125
        padded = np.zeros((self.rows, num_blocks(self.cols) * 128, 2))
        padded[:, : self.cols] = np.stack([np.abs(h) - slack, np.abs(h) + slack], 2)
        least, most = (
            np.moveaxis(padded.reshape(self.rows, num_blocks(self.cols), 128, 2).max(2, initial=0), 2, 0) / 448
        )
        least, most = np.maximum(least, 2.0**-126) * (1 - 2.0**-23), np.maximum(most, 2.0**-126) * (1 + 2.0**-23)
        if self.pow2_scales:
            least, most = (np.exp2(np.ceil(np.log2(x))) for x in (least, most))
        assert ((least <= scales) & (scales <= most)).all(), f"{self}: scales"
        each = expand(scales, self.rows, self.cols, 1)
        bound = np.maximum(np.abs(h) * 2.0**-4, each * 2.0**-10) * (1 + 2.0**-16) + slack
        within(f"{self}: result", data * each, h, bound)

    def _check_gradients(self, inputs: SwigluInputs, parts: Parts) -> None:
        grad_gate, grad_up = (
            half.astype(np.float64) for half in self.split(inputs.arrays.to_numpy(inputs.grad_x.array))
        )
        dh = inputs.arrays.to_numpy(inputs.grad.array).astype(np.float64) * parts.weight
        rest = parts.silu * (1 - parts.sigmoid)
        exact = {
            "gate": (grad_gate, dh * parts.up * (parts.sigmoid + rest), parts.gate_cut),
            "up": (grad_up, dh * parts.silu, parts.up_cut),
        }
        errors = {
            "gate": np.abs(dh * parts.up)
            * ((parts.sigmoid + np.abs(rest)) * 3 * parts.error + 4e-7 * np.abs(parts.silu)),
            "up": np.abs(dh * parts.silu) * (parts.error + 3e-7),
        }
        for name, (actual, expected, cut) in exact.items():
            expected = np.where(cut, 0, expected)
            error = errors[name] + 2.0**-120
            bound = error + HALF_ULP[self.dtype] * (np.abs(expected) + error) + SMALLEST[self.dtype]
            if self.dtype == "f16":
                bound = np.where(np.abs(expected) + bound >= 65504, np.inf, bound)  # it may overflow
            within(f"{self}: gradient of {name}", actual, expected, bound)

    def _check_weights(self, inputs: SwigluInputs, parts: Parts, actual: np.ndarray) -> None:
        terms = inputs.arrays.to_numpy(inputs.grad.array).astype(np.float64) * parts.silu * parts.up
        bound = np.abs(terms * (parts.error + 3e-7)).sum(1) + np.abs(terms).sum(1) * (self.cols + 2) * 2.0**-24
        within(f"{self}: gradient of weights", actual.astype(np.float64), terms.sum(1), bound + 2.0**-120)


def within(what: str, actual: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    bad = np.argwhere(~(np.abs(actual - expected) <= bound))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise AssertionError(
            f"{what}: {len(bad)} of {expected.size} elements are out of bounds; the first, at {at}, is {actual[at]}, "
            f"expected {expected[at]} within {bound[at]}"
        )


def swiglu_cases(rows: int, cols: int, dtype: str) -> Iterator[SwigluCase]:
    """Both layouts, with and without a limit, with and without weights."""
    for interleaved in (False, True):
        for limit in (None, 1.5):
            width = padded(cols, 8) if interleaved else cols
            yield SwigluCase(rows, width, dtype, interleaved, limit, weighted=interleaved == (limit is None))


def random_swiglu_case(rng: random.Random, limit: int, seed: int, **options: Any) -> SwigluCase:
    interleaved = rng.random() < 0.5
    cols = rng.randint(1, limit)
    return SwigluCase(
        rng.randint(1, limit),
        padded(cols, 8) if interleaved else cols,
        rng.choice(("bf16", "f16", "f32")),
        interleaved,
        rng.choice((None, 0.5, 7)),
        rng.random() < 0.5,
        rng.random() < 0.5,
        rng.choice(("mn", "k")),
        rng.choice((0, 0, 8, rng.randint(1, 9))),
        seed=seed,
        **options,
    )


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
