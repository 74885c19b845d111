"""The grouped products and the weight gradients: inputs, and for each group the reference and bound of one product."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import phalanx

from cases.arrays import Guarded, NumPyArrays
from cases.gemm import GemmFp8Case, GemmInputs
from cases.quantize import reference_quantize, same_bytes
from cases.shapes import num_blocks


def stack(matrix: Any, groups: int) -> Any:
    """[G * rows, cols] as [G, rows, cols], without a copy."""
    return matrix.reshape((groups, matrix.shape[0] // groups, matrix.shape[1]))


def holder(array: Any) -> Any:
    """What GemmInputs asks of a Guarded when only values matter."""
    return SimpleNamespace(array=array)


@dataclass
class GroupedInputs:
    arrays: NumPyArrays
    a: Any
    sfa: Any
    b: Any
    sfb: Any
    groups: Any  # offsets, row groups or counts
    d: Guarded
    ranges: list[tuple[int, int]]  # rows of D (of all its groups' rows, one after another) that each group has


@dataclass(frozen=True)
class GroupedGemmCase:
    sizes: tuple[int, ...]
    n: int
    k: int
    form: str = "offsets"  # offsets, row_groups or counts
    out: str = "bf16"
    values: str = "normal"  # as in GemmFp8Case
    sfa_layout: str = "mn"
    pad: int = 0
    max_rows: int = 0  # counts: of every group; by default those of the largest
    gap: int = 0  # rows of no group before, after and, with row_groups, between
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.sizes)) if len(self.sizes) < 9 else f"{len(self.sizes)}g{sum(self.sizes)}"
        return f"{sizes}x{self.n}x{self.k}-{self.form}-{self.out}-{self.sfa_layout}-{self.values}-seed{self.seed}"

    def _product(self, rows: int) -> GemmFp8Case:
        return GemmFp8Case(rows, self.n, self.k, self.out, values=self.values, seed=self.seed)

    def _layout(self) -> tuple[list[tuple[int, int]], int]:
        """Each group's rows, and how many rows A and D have."""
        if self.form == "counts":
            height = max(self.max_rows, *self.sizes, 1)
            return [(g * height, g * height + size) for g, size in enumerate(self.sizes)], height * len(self.sizes)
        ranges, row = [], self.gap
        for size in self.sizes:
            ranges.append((row, row + size))
            row += size + (self.gap if self.form == "row_groups" else 0)
        return ranges, row + self.gap

    def make(self, arrays: NumPyArrays) -> GroupedInputs:
        rng = np.random.default_rng([self.seed, len(self.sizes), self.n, self.k])
        ranges, rows = self._layout()
        num_groups, blocks = len(self.sizes), num_blocks(self.k)
        a, sfa = self._matrix(arrays, rows, self.k, "e4m3"), self._scales(arrays, rows, blocks)
        b = np.empty((num_groups * self.n, self.k), ml_dtypes.float8_e4m3fn)
        sfb = np.empty((num_groups * num_blocks(self.n), blocks), np.float32)
        a_values = np.full((rows, self.k), 0xFF, np.uint8)  # rows of no group stay NaN
        sfa_values = np.full((rows, blocks), np.nan, np.float32)
        for g, (begin, end) in enumerate(ranges):
            generate = getattr(self._product(end - begin), f"_{self.values}")
            (a_g, sfa_values[begin:end]), pair = generate(rng)
            a_values[begin:end] = a_g.view(np.uint8)
            b[g * self.n : (g + 1) * self.n], sfb[g * num_blocks(self.n) : (g + 1) * num_blocks(self.n)] = pair
        arrays.copy_in(a, a_values.view(ml_dtypes.float8_e4m3fn))
        b_array = stack(arrays.copy_in(self._matrix(arrays, *b.shape, "e4m3"), b).array, num_groups)
        sfb_array = stack(arrays.copy_in(arrays.matrix(*sfb.shape, "f32"), sfb).array, num_groups)
        return GroupedInputs(
            arrays,
            self._shaped(a.array),
            self._fill_scales(arrays, sfa, sfa_values),
            b_array,
            sfb_array,
            arrays.integers(self.groups()),
            self._matrix(arrays, rows, self.n, self.out),
            ranges,
        )

    def groups(self) -> list[int]:
        ranges, rows = self._layout()
        if self.form == "counts":
            return list(self.sizes)
        if self.form == "offsets":
            return [self.gap, *(end for _, end in ranges)]
        row_groups = [-1] * rows
        for g, (begin, end) in enumerate(ranges):
            row_groups[begin:end] = [g] * (end - begin)
        return row_groups

    def _matrix(self, arrays: NumPyArrays, rows: int, cols: int, dtype: str) -> Guarded:
        itemsize = {"e4m3": 1, "bf16": 2, "f32": 4}[dtype]
        return arrays.matrix(rows, cols, dtype, stride=(max(1, -(-cols * itemsize // 16)) + self.pad) * 16 // itemsize)

    def _shaped(self, array: Any) -> Any:
        return stack(array, len(self.sizes)) if self.form == "counts" else array

    def _by_group(self) -> bool:
        """Masked, MN-major in each group."""
        return self.form == "counts" and self.sfa_layout == "mn"

    def _scales(self, arrays: NumPyArrays, rows: int, blocks: int) -> Guarded:
        if self._by_group():
            return arrays.matrix(len(self.sizes) * blocks, rows // len(self.sizes), "f32")
        return arrays.matrix(rows, blocks, "f32", by_columns=self.sfa_layout == "mn")

    def _fill_scales(self, arrays: NumPyArrays, scales: Guarded, values: np.ndarray) -> Any:
        if not self._by_group():
            return self._shaped(arrays.copy_in(scales, values).array)
        groups = len(self.sizes)
        by_columns = stack(values, groups).swapaxes(1, 2).reshape(scales.array.shape)
        return stack(arrays.copy_in(scales, by_columns).array, groups).swapaxes(1, 2)

    def run(self, inputs: GroupedInputs, **options: Any) -> Any:
        operation = {
            "offsets": phalanx.grouped_gemm_fp8,
            "row_groups": phalanx.grouped_gemm_fp8_indexed,
            "counts": phalanx.grouped_gemm_fp8_masked,
        }[self.form]
        out = self._shaped(inputs.d.array)
        return operation((inputs.a, inputs.sfa), (inputs.b, inputs.sfb), inputs.groups, out=out, **options)

    def check(self, inputs: GroupedInputs) -> None:
        """Every row within its bound, and no row of no group, nor anything else, written."""
        inputs.d.check_guard()
        arrays, d = inputs.arrays, inputs.d.array
        written = np.zeros(len(d), bool)
        for g, (begin, end) in enumerate(inputs.ranges):
            written[begin:end] = True
            if begin < end:
                self._product(end - begin).check_values(self._group(inputs, g, slice(begin, end)))
        nan = np.isnan(arrays.to_numpy(d).astype(np.float32)).all(1)
        assert nan[~written].all(), f"{self}: rows of no group were written"

    def _group(self, inputs: GroupedInputs, g: int, rows: slice) -> GemmInputs:
        """The product of one group."""
        a, sfa = self._flat(inputs.a), self._flat(inputs.sfa)
        operands = (a[rows], sfa[rows], inputs.b[g], inputs.sfb[g], inputs.d.array[rows])
        return GemmInputs(inputs.arrays, *map(holder, operands), c=None, c_before=None)

    def _flat(self, array: Any) -> Any:
        return array if self.form != "counts" else array.reshape((-1, array.shape[2]))


@dataclass(frozen=True)
class GroupedSwigluCase:
    """grouped_gemm_fp8_swiglu, which gives the bytes of grouped_gemm_fp8 and swiglu_quantize."""

    product: GroupedGemmCase  # of gates and ups, to BF16
    limit: float | None = None
    weighted: bool = False
    pow2_scales: bool = False
    room: bool = False  # for gates and ups: the planner may take the two kernels

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("weighted", "pow2_scales", "room") if getattr(self, name))
        return f"swiglu-{self.product}-limit{self.limit}{flags}"

    def check(self, arrays: NumPyArrays, **options: Any) -> None:
        product = self.product
        inputs = product.make(arrays)
        rows, cols, groups = len(inputs.d.array), product.n // 2, slice(inputs.ranges[0][0], inputs.ranges[-1][1])
        a, b = (inputs.a, inputs.sfa), (inputs.b, inputs.sfb)
        weights = None
        if self.weighted:
            values = np.random.default_rng(product.seed).uniform(-1, 2, (1, rows)).astype(np.float32)
            weights = arrays.copy_in(arrays.matrix(1, rows, "f32"), values).array[0]
        out = (
            arrays.matrix(rows, cols, "e4m3", cols + product.pad * 16),
            arrays.matrix(rows, cols // 128, "f32", by_columns=True),
        )
        room = product._matrix(arrays, rows, product.n, "bf16").array if self.room else None
        how = {"limit": self.limit, "pow2_scales": self.pow2_scales}
        actual = phalanx.grouped_gemm_fp8_swiglu(
            a, b, inputs.groups, weights, out=tuple(x.array for x in out), gates_and_ups=room, **how, **options
        )
        x = product.run(inputs, batch_invariant=options.get("batch_invariant", False))[groups]
        expected = phalanx.swiglu_quantize(x, None if weights is None else weights[groups], **how)
        for name, ours, two in zip(("data", "scales"), actual, expected, strict=True):
            same_bytes(f"{self}: {name}", arrays.to_numpy(ours)[groups], arrays.to_numpy(two))
        for matrix in out:
            matrix.check_guard()


@dataclass(frozen=True)
class WgradCase(GemmFp8Case):
    """wgrad_fp8, or with sizes grouped_wgrad_fp8: `k` columns, of which the groups take some from `gap` on."""

    out: str = "f32"
    accumulate: bool = False
    sizes: tuple[int, ...] | None = None
    gap: int = 0

    @classmethod
    def random(cls, rng: Random, sizes: tuple[int, ...], limit: int, seed: int) -> "WgradCase":
        """Of these groups, M and N up to `limit`, and all else as it comes."""
        gap = rng.choice((0, 9))
        return cls(
            rng.randint(1, limit),
            rng.randint(1, limit),
            sum(sizes) + 2 * gap + rng.randint(1, 100),
            sizes=sizes,
            gap=gap,
            accumulate=rng.random() < 0.5,
            values=rng.choice(("normal", "exact", "bits", "scales")),
            sfa_layout=rng.choice(("mn", "k")),
            pad=rng.randint(0, 3),
            seed=seed,
        )

    def __str__(self) -> str:
        groups = "" if self.sizes is None else f"-groups{'+'.join(map(str, self.sizes))}"
        return f"{super().__str__()}{groups}{'-accumulate' if self.accumulate else ''}"

    def offsets(self) -> list[int]:
        return [int(x) for x in np.cumsum([self.gap, *self.sizes])]

    def make(self, arrays: NumPyArrays) -> GemmInputs:
        rng = np.random.default_rng([self.seed, self.m, self.n, self.k])
        a, sfa = self._operand(rng, self.m)
        b, sfb = self._operand(rng, self.n)
        if self.sizes is not None:  # columns of no group are NaN
            offsets = self.offsets()
            for x in (a, b):
                x.view(np.uint8)[:, : offsets[0]] = x.view(np.uint8)[:, offsets[-1] :] = 0xFF
        num_groups = 1 if self.sizes is None else len(self.sizes)
        out = arrays.matrix(num_groups * self.m, self.n, "f32", stride=self._out_stride())
        before = np.round(rng.standard_normal((num_groups * self.m, self.n)) * 9).astype(np.float32)
        if self.accumulate:
            arrays.copy_in(out, before)

        def operand(values: np.ndarray) -> Guarded:
            stride = (max(1, -(-self.k // 16)) + self.pad) * 16
            return arrays.copy_in(arrays.matrix(len(values), self.k, "e4m3", stride=stride), values)

        def scales(values: np.ndarray) -> Guarded:
            return arrays.copy_in(arrays.matrix(*values.shape, "f32", by_columns=self.sfa_layout == "mn"), values)

        c_before = arrays.f64(out.array) + 0 if self.accumulate else None
        return GemmInputs(arrays, operand(a), scales(sfa), operand(b), scales(sfb), out, None, c_before)

    def _operand(self, rng, rows: int) -> tuple[np.ndarray, np.ndarray]:
        case = replace(self, m=rows, n=1)
        if self.values == "normal":
            x = rng.standard_normal((rows, self.k), np.float32) * np.exp2(rng.integers(-3, 4, (rows, 1)))
            return reference_quantize(x.astype(np.float32), 1, False)
        return getattr(GemmFp8Case, f"_{self.values}")(case, rng)[0]

    def _dequantized(self, inputs: GemmInputs, floor: float = 0.0) -> tuple[Any, Any]:
        f64, xp = inputs.arrays.f64, inputs.arrays.xp
        k_block = inputs.arrays.arange(self.k) // 128
        pairs = []
        for x, scales in ((inputs.a.array, inputs.sfa.array), (inputs.b.array, inputs.sfb.array)):
            x, scales = f64(x), f64(scales)[:, k_block]
            if floor:
                x, scales = xp.where(x == 0, 0.0, xp.clip(abs(x), floor, None)), abs(scales)
            pairs.append(x * scales)
        return tuple(pairs)

    def _scale_roundings(self, inputs: GemmInputs) -> int:
        return 1 if inputs.arrays.device == "cpu" else 21  # the tensor cores multiply scales in two parts

    def run(self, inputs: GemmInputs, **options: Any) -> Any:
        a, b = (inputs.a.array, inputs.sfa.array), (inputs.b.array, inputs.sfb.array)
        if self.sizes is None:
            return phalanx.wgrad_fp8(a, b, out=inputs.out.array, accumulate=self.accumulate, **options)
        out = stack(inputs.out.array, len(self.sizes))
        offsets = inputs.arrays.integers(self.offsets())
        return phalanx.grouped_wgrad_fp8(a, b, offsets, out=out, accumulate=self.accumulate, **options)

    def check(self, inputs: GemmInputs) -> None:
        inputs.out.check_guard()
        one = replace(self, c="alias" if self.accumulate else "none")
        if self.sizes is None:
            one.check_values(inputs)
            return
        # Each group as a product of its own columns, at their places in the blocks of 128.
        arrays, offsets = inputs.arrays, self.offsets()
        for g, (begin, end) in enumerate(pairwise(offsets)):
            rows = slice(g * self.m, (g + 1) * self.m)
            if begin == end:
                expected = 0 if inputs.c_before is None else inputs.c_before[rows]
                assert bool((arrays.f64(inputs.out.array)[rows] == expected).all()), f"{self}: empty group {g}"
                continue
            first = begin // 128 * 128  # the block in which it begins
            own = replace(one, k=end - first)
            columns, blocks = slice(first, first + own.k), slice(first // 128, first // 128 + num_blocks(own.k))
            inside = (arrays.arange(own.k) + first >= begin) & (arrays.arange(own.k) + first < end)
            a, b = (self._zero_outside(arrays, x.array[:, columns], inside) for x in (inputs.a, inputs.b))
            operands = (a, inputs.sfa.array[:, blocks], b, inputs.sfb.array[:, blocks], inputs.out.array[rows])
            c_before = None if inputs.c_before is None else inputs.c_before[rows]
            own.check_values(GemmInputs(arrays, *map(holder, operands), None, c_before))

    @staticmethod
    def _zero_outside(arrays: NumPyArrays, x: Any, inside: Any) -> Any:
        return arrays.xp.where(inside, arrays.f64(x), 0.0)
