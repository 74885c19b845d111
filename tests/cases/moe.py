"""route, permute, unpermute and the backward of the latter: integers and bytes are exact, and so are sums, whose order
and rounding are defined; the gradient of the weights has a bound."""

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import phalanx

from cases.arrays import NUMPY_DTYPES, Guarded, NumPyArrays
from cases.quantize import same_bytes
from cases.shapes import num_blocks


class Rows(NamedTuple):
    """What `route` is to say."""

    counts: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray
    sources: np.ndarray
    needed: np.ndarray


def reference_route(topk_idx: np.ndarray, experts: int, num_rows: int, alignment: int, max_rows: int) -> Rows:
    """From the definition, one choice after another."""
    entries: list[list[int]] = [[] for _ in range(experts)]
    for entry, expert in enumerate(topk_idx.ravel().tolist()):
        if 0 <= expert < experts:
            entries[expert].append(entry)
    slots, sources = np.full(topk_idx.size, -1), np.full(num_rows, -1)
    counts, offsets, taken = [], [], 0
    for expert, chosen in enumerate(entries):
        first = expert * max_rows if max_rows else min(taken, num_rows)
        fit = min(len(chosen), max_rows if max_rows else num_rows - first)
        for position, entry in enumerate(chosen[:fit]):
            slots[entry], sources[first + position] = first + position, entry
        counts.append(fit)
        offsets.append(first)
        taken += -(-len(chosen) // alignment) * alignment
    offsets.append(experts * max_rows if max_rows else min(taken, num_rows))
    needed = max(map(len, entries)) if max_rows else taken
    fields = counts, offsets, slots.reshape(topk_idx.shape), sources, [needed]
    return Rows(*(np.asarray(values, np.int32) for values in fields))


def make_topk(rng: np.random.Generator, tokens: int, topk: int, experts: int, choices: str) -> np.ndarray:
    if choices == "one":  # all on the last expert
        return np.full((tokens, topk), experts - 1)
    if choices == "none":
        return np.full((tokens, topk), -1)
    if choices == "distinct":
        topk_idx = rng.permuted(np.tile(np.arange(max(experts, topk)), (tokens, 1)), axis=1)[:, :topk]
        return np.where(topk_idx < experts, topk_idx, -1)
    topk_idx = rng.integers(0, experts, (tokens, topk))  # repeats among them
    if choices == "skewed":
        topk_idx = np.minimum(topk_idx, rng.integers(0, experts, (tokens, topk)) ** 2 // experts)
    topk_idx[rng.random(topk_idx.shape) < 0.2] = -1
    topk_idx[rng.random(topk_idx.shape) < 0.02] = experts
    return topk_idx


def to_f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def reference_unpermute(
    rows: np.ndarray, slots: np.ndarray, weights: np.ndarray | None, residual: np.ndarray | None, dtype: str
) -> np.ndarray:
    """FP32, a product and a sum at a time."""
    sums = np.zeros((slots.shape[0], rows.shape[1]), np.float32)
    for k in range(slots.shape[1]):
        there = slots[:, k] >= 0
        weight = np.float32(1) if weights is None else weights[there, k, None]
        sums[there] += weight * to_f32(rows[slots[there, k]])
    if residual is not None:
        sums += to_f32(residual)
    return sums.astype(NUMPY_DTYPES[dtype])


@dataclass
class MoeInputs:
    arrays: NumPyArrays
    topk_idx: Any
    x: Guarded
    x_scales: Guarded | None
    weights: Any
    residual: Guarded
    grad_out: Guarded


@dataclass(frozen=True)
class MoeCase:
    """The way there and back. `data` "e4m3" permutes bytes with scales; un-permuting has rows of `rows` and tokens of
    `tokens_dtype`."""

    tokens: int
    experts: int
    topk: int
    hidden: int
    data: str = "e4m3"
    rows: str = "bf16"
    tokens_dtype: str = "bf16"
    choices: str = "random"
    alignment: int = 1
    max_rows: int = 0
    capacity: int | None = None
    index: str = "int64"
    fused: bool = False
    weighted: bool = True
    residual: bool = False
    zero_padding: bool = True
    pad: int = 0  # 16-byte units at the end of rows
    seed: int = field(default=0, compare=False)

    @property
    def num_rows(self) -> int:
        if self.max_rows:
            return self.experts * self.max_rows
        entries = self.tokens * self.topk
        return entries + min(self.experts, entries) * (self.alignment - 1) if self.capacity is None else self.capacity

    def _matrix(self, arrays: NumPyArrays, rows: int, dtype: str) -> Guarded:
        return arrays.matrix(rows, self.hidden, dtype, self.hidden + self.pad * 16 // NUMPY_DTYPES[dtype].itemsize)

    def make(self, arrays: NumPyArrays) -> MoeInputs:
        rng = np.random.default_rng([self.seed, self.tokens, self.experts, self.topk, self.hidden])

        def normal(rows: int, dtype: str) -> Guarded:
            values = rng.standard_normal((rows, self.hidden), np.float32).astype(NUMPY_DTYPES[dtype])
            return arrays.copy_in(self._matrix(arrays, rows, dtype), values)

        topk_idx = make_topk(rng, self.tokens, self.topk, self.experts, self.choices).astype(self.index)
        wide = np.full((self.tokens, self.topk + 3), -1, self.index)
        wide[:, : self.topk] = topk_idx
        weights = rng.random((self.tokens, self.topk + 1), np.float32)
        itemsize = NUMPY_DTYPES[self.data].itemsize
        elements = rng.integers(0, 256, (self.tokens, self.hidden * itemsize), np.uint8).view(NUMPY_DTYPES[self.data])
        scales = None
        if self.data == "e4m3":
            scales = arrays.matrix(self.tokens, num_blocks(self.hidden), "f32", by_columns=bool(self.seed % 2 == 0))
            arrays.copy_in(scales, rng.random((self.tokens, num_blocks(self.hidden)), np.float32))
        return MoeInputs(
            arrays,
            arrays._from_numpy(wide)[:, : self.topk],
            arrays.copy_in(self._matrix(arrays, self.tokens, self.data), elements),
            scales,
            arrays._from_numpy(weights)[:, : self.topk],
            normal(self.tokens, self.tokens_dtype),
            normal(self.tokens, self.tokens_dtype),
        )

    # --- outputs in poisoned memory -----------------------------------------------------------------------------------

    def _rows(self, arrays: NumPyArrays, dtype: str) -> tuple[Guarded, Any]:
        guarded = self._matrix(arrays, self.num_rows, dtype)
        stack = (self.experts, self.max_rows, self.hidden)
        return guarded, guarded.array.reshape(stack) if self.max_rows else guarded.array

    def _scales(self, arrays: NumPyArrays) -> tuple[Guarded, Any]:
        columns = num_blocks(self.hidden)
        if not self.max_rows:
            guarded = arrays.matrix(self.num_rows, columns, "f32", by_columns=True)
            return guarded, guarded.array
        guarded = arrays.matrix(self.experts * columns, self.max_rows, "f32")
        return guarded, guarded.array.reshape(self.experts, columns, self.max_rows).swapaxes(1, 2)

    # --- run and check ------------------------------------------------------------------------------------------------

    def run_and_check(self, arrays: NumPyArrays) -> None:
        inputs = self.make(arrays)
        topk_idx = self._numpy(inputs.topk_idx)
        expected = reference_route(topk_idx, self.experts, self.num_rows, self.alignment, self.max_rows)
        routing = self._permute(inputs, expected)
        for name, values in expected._asdict().items():
            same_bytes(f"{self}: {name}", self._numpy(getattr(routing, name)), values)
        self._unpermute(inputs, routing, expected)
        self._backward(inputs, routing, expected)

    @staticmethod
    def _numpy(array: Any) -> np.ndarray:
        return array if isinstance(array, np.ndarray) else array.cpu().numpy()

    def _permute(self, inputs: MoeInputs, expected: Rows) -> phalanx.Routing:
        arrays, x, scales = inputs.arrays, inputs.x.array, inputs.x_scales
        rows, out = self._rows(arrays, self.data)
        options = (self.experts, None if self.max_rows else self.num_rows, self.alignment, self.max_rows)
        if scales is not None:
            row_scales, out_scales = self._scales(arrays)
            x, out = (x, scales.array), (out, out_scales)
        if self.fused:
            result, routing = phalanx.route_and_permute(
                x, inputs.topk_idx, *options, out=out, zero_padding=self.zero_padding
            )
        else:
            routing = phalanx.route(inputs.topk_idx, *options)
            result = phalanx.permute(x, routing, out=out, zero_padding=self.zero_padding)
        assert result is out

        there = expected.sources >= 0
        token = expected.sources[there] // max(self.topk, 1)
        data = np.ascontiguousarray(arrays.to_numpy(inputs.x.array)).view(np.uint8)
        bits = np.full((self.num_rows, data.shape[1]), 0 if self.zero_padding else 0xFF, np.uint8)
        bits[there] = data[token]
        same_bytes(f"{self}: rows", np.ascontiguousarray(arrays.to_numpy(rows.array)).view(np.uint8), bits)
        rows.check_guard()
        if scales is not None:
            values = np.ones((self.num_rows, num_blocks(self.hidden)), np.float32)
            if not self.zero_padding:
                values.view(np.uint8)[...] = 0xFF
            values[there] = arrays.to_numpy(scales.array)[token]
            same_bytes(f"{self}: scales", arrays.to_numpy(out_scales).reshape(values.shape), values)
            row_scales.check_guard()
        return routing

    def _unpermute(self, inputs: MoeInputs, routing: phalanx.Routing, expected: Rows) -> None:
        arrays = inputs.arrays
        rows, rows_array, values = self._expert_rows(arrays, expected)
        out = self._matrix(arrays, self.tokens, self.tokens_dtype)
        weights = inputs.weights if self.weighted else None
        residual = inputs.residual.array if self.residual else None
        assert phalanx.unpermute(rows_array, routing, weights, residual, out=out.array) is out.array
        as_numpy = None if residual is None else arrays.to_numpy(residual)
        sums = reference_unpermute(
            values, expected.slots, None if weights is None else self._numpy(weights), as_numpy, self.tokens_dtype
        )
        same_bytes(f"{self}: unpermute", arrays.to_numpy(out.array), sums)
        out.check_guard()
        rows.check_guard()

    def _expert_rows(self, arrays: NumPyArrays, expected: Rows) -> tuple[Guarded, Any, np.ndarray]:
        """Rows of experts to un-permute: padding rows are NaN, and must not be read."""
        values = np.random.default_rng(self.seed + 1).standard_normal((self.num_rows, self.hidden), np.float32)
        values = values.astype(NUMPY_DTYPES[self.rows])
        values.view(np.uint8)[expected.sources < 0] = 0xFF
        guarded, array = self._rows(arrays, self.rows)
        arrays.copy_in(guarded, values)
        return guarded, array, values

    def _backward(self, inputs: MoeInputs, routing: phalanx.Routing, expected: Rows) -> None:
        arrays, slots = inputs.arrays, expected.slots
        _, rows_array, rows = self._expert_rows(arrays, expected)
        weights = inputs.weights if self.weighted else None
        grad_rows, grad_weights = phalanx.unpermute_backward(
            inputs.grad_out.array, routing, weights, rows_array if self.weighted else None, rows_array.dtype
        )
        grad = to_f32(arrays.to_numpy(inputs.grad_out.array))
        expected_rows = np.zeros_like(rows)
        for k in range(self.topk):
            there = slots[:, k] >= 0
            weight = self._numpy(weights)[there, k, None] if self.weighted else np.float32(1)
            expected_rows[slots[there, k]] = (weight * grad[there]).astype(rows.dtype)
        actual = np.ascontiguousarray(arrays.to_numpy(grad_rows)).reshape(expected_rows.shape)
        same_bytes(f"{self}: grad_rows", actual, expected_rows)
        if not self.weighted:
            assert grad_weights is None
            return
        actual = self._numpy(grad_weights).astype(np.float64)
        for k in range(self.topk):
            there = slots[:, k] >= 0
            assert not actual[~there, k].any()
            products = grad[there].astype(np.float64) * rows[slots[there, k]].astype(np.float64)
            bound = 1.01 * (self.hidden / 8 + 16) * 2.0**-24 * np.abs(products).sum(1) + 2.0**-120
            error = np.abs(actual[there, k] - products.sum(1))
            assert (error <= bound).all(), f"{self}: grad_weights[:, {k}] is off by {(error / bound).max()} bounds"


def random_moe_cases(count: int, seed: int, tokens: int, hidden: int) -> list[MoeCase]:
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        data = rng.choice(("e4m3", "e4m3", "bf16", "f32"))
        topk, experts = rng.randint(1, 32 if rng.random() < 0.1 else 10), rng.choice((1, 3, 32, 100, 256, 1000))
        number = round(2 ** rng.uniform(0, tokens.bit_length() - 1))
        entries = number * topk
        masked = rng.random() < 0.4
        capacity = None if rng.random() < 0.6 else rng.randint(0, entries + 10)
        cases.append(
            MoeCase(
                tokens=number,
                experts=experts,
                topk=topk,
                hidden=16 * rng.randint(1, hidden // 16),
                data=data,
                rows=rng.choice(("bf16", "f32")),
                tokens_dtype=rng.choice(("bf16", "f32")),
                choices=rng.choice(("random", "random", "skewed", "distinct", "one")),
                alignment=1 if masked else rng.choice((1, 1, 8, 128 if experts < 50 else 4)),
                max_rows=rng.randint(1, 2 + 3 * entries // experts) if masked else 0,
                capacity=None if masked else capacity,
                index=rng.choice(("int32", "int64")),
                fused=rng.random() < 0.5,
                weighted=rng.random() < 0.8,
                residual=rng.random() < 0.5,
                zero_padding=rng.random() < 0.8,
                pad=rng.choice((0, 0, 1, 3)),
                seed=rng.randrange(10**6),
            )
        )
    return cases


EDGES = [
    MoeCase(0, 4, 2, 64),
    MoeCase(0, 4, 2, 64, max_rows=3),
    MoeCase(5, 4, 0, 64),
    MoeCase(1, 1, 1, 16, fused=True),
    MoeCase(7, 4, 2, 64, capacity=0),
    MoeCase(7, 4, 2, 64, capacity=0, fused=True),
    MoeCase(33, 8, 2, 7168, choices="none", fused=True),
    MoeCase(33, 8, 2, 7168, choices="one", fused=True, capacity=50),
    MoeCase(33, 8, 2, 7168, choices="one", max_rows=40),
    MoeCase(300, 1024, 8, 528, choices="distinct", alignment=4),
    MoeCase(40, 8, 32, 2048, data="bf16", choices="one", rows="f32", residual=True),
    MoeCase(64, 32, 8, 896, data="bf16", alignment=128, fused=True, tokens_dtype="f32", residual=True),
    MoeCase(64, 32, 8, 1040, max_rows=64, zero_padding=False, fused=True),
]
