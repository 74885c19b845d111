"""The BF16 products: inputs, FP64 references and bounds. Dense, of groups, and gradients of weights."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import phalanx

from cases.arrays import NUMPY_DTYPES, Guarded, NumPyArrays
from cases.gemm import GemmFp8Case, GemmInputs
from cases.grouped import GroupedGemmCase, GroupedInputs, holder, stack

BF16 = NUMPY_DTYPES["bf16"]
NAN = np.array(0x7FFF, np.uint16).view(BF16)


def values_of(kind: str, rng: Any, rows: int, cols: int) -> np.ndarray:
    """normal: rows of different level; exact: small integers, whose every sum is exact."""
    if kind == "exact":
        return rng.integers(-8, 9, (rows, cols)).astype(np.float32).astype(BF16)
    levels = np.exp2(rng.integers(-3, 4, (rows, 1))).astype(np.float32)
    return (rng.standard_normal((rows, cols), np.float32) * levels).astype(BF16)


def matrix(arrays: NumPyArrays, values: np.ndarray, major: str = "k", pad: int = 0) -> Guarded:
    """`values` [rows, K] in guarded memory, contiguous along K or along the rows (mn)."""
    line = values.shape[1 if major == "k" else 0]
    stride = (max(1, -(-line // 8)) + pad) * 8
    return arrays.copy_in(arrays.matrix(*values.shape, "bf16", stride, by_columns=major == "mn"), values)


@dataclass(frozen=True)
class GemmBf16Case(GemmFp8Case):
    major_a: str = "k"
    major_b: str = "k"

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.major_a}-{self.major_b}"

    @property
    def bytes(self) -> int:
        d = self.m * self.n * (2 if self.out == "bf16" else 4) * (1 if self.c == "none" else 2)
        return 2 * (self.m + self.n) * self.k + d

    def make(self, arrays: NumPyArrays) -> GemmInputs:
        rng = np.random.default_rng([self.seed, self.m, self.n, self.k])
        a, b = (values_of(self.values, rng, rows, self.k) for rows in (self.m, self.n))
        out = arrays.matrix(self.m, self.n, self.out, stride=self._out_stride())
        c = None
        if self.c != "none":
            c = out if self.c == "alias" else arrays.matrix(self.m, self.n, self.out)
            arrays.copy_in(c, (rng.standard_normal((self.m, self.n), np.float32) * 3).astype(NUMPY_DTYPES[self.out]))
        c_before = None if c is None else arrays.f64(c.array)
        of_a, of_b = matrix(arrays, a, self.major_a, self.pad), matrix(arrays, b, self.major_b, self.pad)
        return GemmInputs(arrays, of_a, None, of_b, None, out, c, c_before)

    def run(self, inputs: GemmInputs, **options: Any) -> Any:
        c = None if inputs.c is None else inputs.c.array
        return phalanx.gemm_bf16(inputs.a.array, inputs.b.array, c=c, out=inputs.out.array, **options)

    def _dequantized(self, inputs: GemmInputs, floor: float = 0.0) -> tuple[Any, Any]:
        return inputs.arrays.f64(inputs.a.array), inputs.arrays.f64(inputs.b.array)

    def bound(self, inputs: GemmInputs, reference: Any) -> Any:
        """docs/numerics.md, "BF16"."""
        a, b = self._dequantized(inputs)
        s = abs(a) @ abs(b).T
        ulp = 2.0**-24 if inputs.arrays.device == "cpu" else 2.0**-23
        return self._rounded(1.1 * (self.k + 16) * ulp * s, reference)


@dataclass(frozen=True)
class GroupedBf16Case(GroupedGemmCase):
    major_b: str = "k"

    def __str__(self) -> str:
        return f"{super().__str__()}-b_{self.major_b}"

    def _product(self, rows: int) -> GemmBf16Case:
        return GemmBf16Case(rows, self.n, self.k, self.out, values=self.values)

    def make(self, arrays: NumPyArrays) -> GroupedInputs:
        rng = np.random.default_rng([self.seed, len(self.sizes), self.n, self.k])
        ranges, rows = self._layout()
        num_groups = len(self.sizes)
        a = np.full((rows, self.k), NAN)  # rows of no group stay NaN
        for begin, end in ranges:
            a[begin:end] = values_of(self.values, rng, end - begin, self.k)
        b = values_of(self.values, rng, num_groups * self.n, self.k)
        if self.major_b == "k":
            b_array = stack(matrix(arrays, b, pad=self.pad).array, num_groups)
        else:  # one expert's K after the other's
            lines = stack(b, num_groups).swapaxes(1, 2).reshape(num_groups * self.k, self.n)
            b_array = stack(matrix(arrays, lines, pad=self.pad).array, num_groups).swapaxes(1, 2)
        return GroupedInputs(
            arrays,
            self._shaped(matrix(arrays, a, pad=self.pad).array),
            None,
            b_array,
            None,
            arrays.integers(self.groups()),
            self._matrix(arrays, rows, self.n, self.out),
            ranges,
        )

    def run(self, inputs: GroupedInputs, **options: Any) -> Any:
        operation = {
            "offsets": phalanx.grouped_gemm_bf16,
            "row_groups": phalanx.grouped_gemm_bf16_indexed,
            "counts": phalanx.grouped_gemm_bf16_masked,
        }[self.form]
        return operation(inputs.a, inputs.b, inputs.groups, out=self._shaped(inputs.d.array), **options)

    def _group(self, inputs: GroupedInputs, g: int, rows: slice) -> GemmInputs:
        a, b, d = map(holder, (self._flat(inputs.a)[rows], inputs.b[g], inputs.d.array[rows]))
        return GemmInputs(inputs.arrays, a, None, b, None, d, c=None, c_before=None)


@dataclass(frozen=True)
class WgradBf16Case(GemmBf16Case):
    """grouped_wgrad_bf16: `k` tokens, of which the groups take some from `gap` on. The others are NaN."""

    out: str = "f32"
    sizes: tuple[int, ...] = ()
    gap: int = 0
    accumulate: bool = False

    def __str__(self) -> str:
        groups = "+".join(map(str, self.sizes))
        return f"{super().__str__()}-groups{groups}{'-accumulate' if self.accumulate else ''}"

    def offsets(self) -> list[int]:
        return [int(x) for x in np.cumsum([self.gap, *self.sizes])]

    def make(self, arrays: NumPyArrays) -> GemmInputs:
        rng = np.random.default_rng([self.seed, self.m, self.n, self.k])
        a, b = (values_of(self.values, rng, self.k, cols) for cols in (self.m, self.n))
        offsets = self.offsets()
        for x in (a, b):
            x[: offsets[0]] = x[offsets[-1] :] = NAN
        rows = len(self.sizes) * self.m
        out = arrays.matrix(rows, self.n, "f32", stride=self._out_stride())
        if self.accumulate:
            arrays.copy_in(out, np.round(rng.standard_normal((rows, self.n)) * 9).astype(np.float32))
        before = arrays.f64(out.array) + 0 if self.accumulate else None
        return GemmInputs(arrays, matrix(arrays, a, pad=self.pad), None, matrix(arrays, b), None, out, None, before)

    def run(self, inputs: GemmInputs, **options: Any) -> Any:
        out, offsets = stack(inputs.out.array, len(self.sizes)), inputs.arrays.integers(self.offsets())
        a, b = inputs.a.array, inputs.b.array
        return phalanx.grouped_wgrad_bf16(a, b, offsets, out=out, accumulate=self.accumulate, **options)

    def check(self, inputs: GemmInputs) -> None:
        inputs.out.check_guard()
        arrays, c = inputs.arrays, "alias" if self.accumulate else "none"
        for g, (begin, end) in enumerate(pairwise(self.offsets())):
            rows = slice(g * self.m, (g + 1) * self.m)
            before = None if inputs.c_before is None else inputs.c_before[rows]
            if begin == end:
                expected = 0 if before is None else before
                assert bool((arrays.f64(inputs.out.array)[rows] == expected).all()), f"{self}: empty group {g}"
                continue
            a, b = (holder(x.array[begin:end].T) for x in (inputs.a, inputs.b))
            own = GemmBf16Case(self.m, self.n, end - begin, "f32", c, values=self.values)
            own.check_values(GemmInputs(arrays, a, None, b, None, holder(inputs.out.array[rows]), None, before))
