"""gemm_fp8: inputs, the FP64 reference and the bound of docs/numerics.md."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import phalanx

from cases.arrays import NUMPY_DTYPES, Guarded, NumPyArrays
from cases.quantize import reference_quantize
from cases.shapes import BLOCK, num_blocks


@dataclass
class GemmInputs:
    arrays: NumPyArrays
    a: Guarded
    sfa: Guarded | None  # BF16 has none
    b: Guarded
    sfb: Guarded | None
    out: Guarded
    c: Guarded | None
    c_before: Any  # C's values, as the operation may write D over them


@dataclass(frozen=True)
class GemmFp8Case:
    m: int
    n: int
    k: int
    out: str = "bf16"
    c: str = "none"  # none, apart, or alias: C is D
    sfa_layout: str = "mn"  # mn or k: which stride is 1
    pad: int = 0  # further 16-byte units at the end of the rows of A, B and D
    # normal: quantised activations and weights; bits: any E4M3; exact: see docs/numerics.md; scales: exact but for them
    values: str = "normal"
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        c = "" if self.c == "none" else f"-c_{self.c}"
        return f"{self.m}x{self.n}x{self.k}-{self.out}{c}-{self.sfa_layout}-pad{self.pad}-{self.values}-seed{self.seed}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """The fewest that must move."""
        d = self.m * self.n * (2 if self.out == "bf16" else 4) * (1 if self.c == "none" else 2)
        scales = 4 * num_blocks(self.k) * (self.m + num_blocks(self.n))
        return (self.m + self.n) * self.k + scales + d

    # --- inputs -----------------------------------------------------------------------------------------------------

    def make(self, arrays: NumPyArrays) -> GemmInputs:
        rng = np.random.default_rng([self.seed, self.m, self.n, self.k])
        (a, sfa), (b, sfb) = getattr(self, f"_{self.values}")(rng)

        def guarded(values: np.ndarray, dtype: str, pad: int = 0, **layout: Any) -> Guarded:
            rows, cols = values.shape
            itemsize = values.dtype.itemsize
            stride = (max(1, -(-cols * itemsize // 16)) + pad) * 16 // itemsize
            if not layout:
                layout = {"stride": stride}
            return arrays.copy_in(arrays.matrix(rows, cols, dtype, **layout), values)

        out = arrays.matrix(self.m, self.n, self.out, stride=self._out_stride())
        c = None
        if self.c != "none":
            values = (rng.standard_normal((self.m, self.n), np.float32) * 3).astype(NUMPY_DTYPES[self.out])
            c = out if self.c == "alias" else arrays.matrix(self.m, self.n, self.out)
            arrays.copy_in(c, values)
        return GemmInputs(
            arrays,
            guarded(a, "e4m3", self.pad),
            guarded(sfa, "f32", by_columns=self.sfa_layout == "mn"),
            guarded(b, "e4m3", self.pad),
            guarded(sfb, "f32", by_columns=False),
            out,
            c,
            None if c is None else arrays.f64(c.array),
        )

    def _out_stride(self) -> int:
        itemsize = 2 if self.out == "bf16" else 4
        return (-(-self.n * itemsize // 16) + self.pad) * 16 // itemsize

    def _normal(self, rng):
        """Activations with a few loud channels and rows of different level, weights of different level per block."""
        x = rng.standard_normal((self.m, self.k), np.float32) * np.exp2(rng.integers(-3, 4, (self.m, 1))).astype(
            np.float32
        )
        x *= np.where(rng.random(self.k) < 0.01, 30, 1).astype(np.float32)
        w = rng.standard_normal((self.n, self.k), np.float32) * np.float32(self.k**-0.5)
        w *= np.exp2(rng.integers(-2, 3, (num_blocks(self.n), 1))).astype(np.float32).repeat(BLOCK, 0)[: self.n]
        return reference_quantize(x, 1, False), reference_quantize(w, BLOCK, False)

    def _exact(self, rng):
        """Small integers and equal powers of two: every step is exact, so the result must be."""

        sfa = np.exp2(rng.integers(-4, 5, (self.m, 1))).repeat(num_blocks(self.k), 1)
        sfb = np.exp2(rng.integers(-4, 5, (num_blocks(self.n), 1))).repeat(num_blocks(self.k), 1)
        for scales in (sfa, sfb):  # one block of each row weighs double: a scale in the wrong place shows
            rows = len(scales)
            scales[np.arange(rows), rng.integers(0, num_blocks(self.k), rows)] *= 2
        return (self._integers(rng, self.m), sfa.astype(np.float32)), (
            self._integers(rng, self.n),
            sfb.astype(np.float32),
        )

    def _integers(self, rng, rows: int) -> np.ndarray:
        return rng.integers(-8, 9, (rows, self.k)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)

    def _scales(self, rng):
        """Small integers, and scales of 24 bits: the bound is that of the scales' product and of the sums alone."""

        def scales(rows: int) -> np.ndarray:
            return np.exp2(rng.uniform(-2, 2, (rows, num_blocks(self.k)))).astype(np.float32)

        return (self._integers(rng, self.m), scales(self.m)), (self._integers(rng, self.n), scales(num_blocks(self.n)))

    def _bits(self, rng):
        """Every finite E4M3 value, and scales over twenty octaves."""

        def scaled(rows, scale_rows):
            data = rng.integers(0, 256, (rows, self.k), np.uint8)
            data[(data & 0x7F) == 0x7F] ^= 1
            scales = np.exp2(rng.uniform(-10, 10, (scale_rows, num_blocks(self.k)))).astype(np.float32)
            return data.view(ml_dtypes.float8_e4m3fn), scales

        return scaled(self.m, self.m), scaled(self.n, num_blocks(self.n))

    # --- the operation ----------------------------------------------------------------------------------------------

    def run(self, inputs: GemmInputs, **options: Any) -> Any:
        a = (inputs.a.array, inputs.sfa.array)
        b = (inputs.b.array, inputs.sfb.array)
        c = None if inputs.c is None else inputs.c.array
        return phalanx.gemm_fp8(a, b, c=c, out=inputs.out.array, **options)

    # --- the truth --------------------------------------------------------------------------------------------------

    def _dequantized(self, inputs: GemmInputs, floor: float = 0.0) -> tuple[Any, Any]:
        """A and B with their scales, in FP64. With `floor`: |x|' |s|, nonzero magnitudes raised to it."""
        f64, xp = inputs.arrays.f64, inputs.arrays.xp
        k_block = inputs.arrays.arange(self.k) // BLOCK
        n_block = inputs.arrays.arange(self.n) // BLOCK
        a, sfa = f64(inputs.a.array), f64(inputs.sfa.array)[:, k_block]
        b, sfb = f64(inputs.b.array), f64(inputs.sfb.array)[n_block][:, k_block]
        if floor:
            a, b = (xp.where(x == 0, 0.0, xp.clip(abs(x), floor, None)) for x in (a, b))
            sfa, sfb = abs(sfa), abs(sfb)
        return a * sfa, b * sfb

    def reference(self, inputs: GemmInputs) -> Any:
        a, b = self._dequantized(inputs)
        product = a @ b.T
        return product if inputs.c_before is None else product + inputs.c_before

    def bound(self, inputs: GemmInputs, reference: Any) -> Any:
        """Of |D - reference| per element: docs/numerics.md, "The product"."""
        a, b = self._dequantized(inputs, floor=2.0**-6)
        s = a @ b.T
        nb = num_blocks(self.k)
        if self.values == "scales":
            e_p = 0.0
        elif inputs.arrays.device == "cpu":
            e_p = 1.01 * 129 * 2.0**-24 * s
        else:
            e_p = 1.02 * 34 * 2.0**-13 * self._accumulator_magnitudes(inputs, a, b)
        roundings = nb + self._scale_roundings(inputs) + 1
        return self._rounded(e_p + 1.01 * roundings * 2.0**-24 * (s + e_p), reference) + nb * 2.0**-100

    def _scale_roundings(self, inputs: GemmInputs) -> int:
        """The error of sfa * sfb, in units of 2^-24."""
        return 1

    def _rounded(self, bound: Any, reference: Any) -> Any:
        """The bound after C has been added and D rounded."""
        if self.c != "none":
            bound = bound + 2.0**-24 * (abs(reference) + bound)
        if self.out == "bf16":
            bound = bound + 2.0**-8 * (abs(reference) + bound)
        return bound

    def _accumulator_magnitudes(self, inputs: GemmInputs, a_abs: Any, b_abs: Any) -> Any:
        """T of docs/numerics.md, "Hopper's accumulator"; the scales are in the factors already."""
        a, b = self._dequantized(inputs)
        xp = inputs.arrays.xp
        total = xp.zeros_like(a @ b.T)
        for block in range(0, self.k, BLOCK):
            before = xp.zeros_like(total)
            for start in range(block, min(block + BLOCK, self.k), 32):
                part = slice(start, min(start + 32, block + BLOCK, self.k))
                after = before + a[:, part] @ b[:, part].T
                norm = xp.sqrt(a_abs[:, part] ** 2 @ (b_abs[:, part] ** 2).T)
                total += xp.maximum(norm, xp.maximum(abs(before), abs(after)))
                before = after
        return total

    # --- the verdict ------------------------------------------------------------------------------------------------

    def check(self, inputs: GemmInputs) -> None:
        """D is within the bound in every element, NaN exactly where the reference is, and nothing else was written."""
        inputs.out.check_guard()
        self.check_values(inputs)

    def check_values(self, inputs: GemmInputs) -> None:
        xp, d = inputs.arrays.xp, inputs.arrays.f64(inputs.out.array)
        reference = self.reference(inputs)
        if self.values == "exact" and self.c == "none":
            bad = d != inputs.arrays.rounded(reference, self.out)
        else:
            error, bound = abs(d - reference), self.bound(inputs, reference)
            bad = ~(error <= bound) & ~(xp.isnan(d) & xp.isnan(reference))
        if bool(bad.any()):
            m, n = (int(i) for i in np.argwhere(np.asarray(bad.tolist()))[0])
            raise AssertionError(
                f"{self}: {int(bad.sum())} of {self.m * self.n} elements are wrong; the first is D[{m}, {n}] = "
                f"{float(d[m, n])}, expected {float(reference[m, n])}"
            )
