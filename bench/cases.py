"""Shapes and inputs. The shapes are those of tests/cases/shapes.json, so that what is timed is also what is tested."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

SHAPES_PATH = Path(__file__).resolve().parent.parent / "tests" / "cases" / "shapes.json"
DEFAULT_GROUPS = ("prefill", "square", "decode")
DECODE_ROWS = (1, 16, 64, 128)
BLOCK = 128
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Shape:
    group: str
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def num_bytes(self) -> int:
        """The fewest that must move: each input read once, each output written once."""
        k_blocks = -(-self.k // BLOCK)
        scales = 4 * k_blocks * (self.m + -(-self.n // BLOCK))
        return self.m * self.k + self.n * self.k + scales + 2 * self.m * self.n

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


def load_shapes(
    path: Path = SHAPES_PATH, groups: tuple[str, ...] = DEFAULT_GROUPS, ms: tuple[int, ...] = ()
) -> list[Shape]:
    """The (M, N, K) of the groups; with `ms`, their (N, K) at those M instead."""
    table = json.loads(path.read_text())
    unknown = [group for group in groups if group not in table]
    if unknown:
        raise ValueError(f"no group {unknown[0]!r} in {path}; it has {', '.join(table)}")
    shapes = [Shape(group, *mnk) for group in groups for mnk in table[group]]
    if ms:
        weights = dict.fromkeys((shape.n, shape.k) for shape in shapes)
        shapes = [Shape(f"m{m}", m, n, k) for m in ms for n, k in weights]
    return [shape for shape in shapes if shape.m > 0]


def _odd_shapes() -> list[Shape]:
    mnk = itertools.product((1, 3, 17, 65, 129, 1000, 4097), (576, 2112, 7168), (512, 768, 7168))
    return [Shape("odd", *sizes) for sizes in mnk]


SUITES = {
    "prefill": lambda: load_shapes(groups=("prefill", "square")),
    "decode": lambda: load_shapes(groups=("decode",), ms=DECODE_ROWS),
    "odd": _odd_shapes,
}


def parse_shape(text: str) -> Shape:
    """ "4096x7168x2048" """
    m, n, k = (int(part) for part in text.lower().replace(",", "x").split("x"))
    return Shape("given", m, n, k)


def quantize(x: torch.Tensor, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 with one FP32 scale per `block_rows` x 128, in plain torch: inputs do not depend on what is measured.

    The scales of rows come column by column (MN-major, each column 16-byte aligned): every library reads that layout
    without a conversion.
    """
    rows, cols = x.shape
    k_blocks, row_blocks = -(-cols // BLOCK), -(-rows // block_rows)
    padded = torch.nn.functional.pad(x.float(), (0, k_blocks * BLOCK - cols, 0, row_blocks * block_rows - rows))
    blocks = padded.view(row_blocks, block_rows, k_blocks, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp_(min=2.0**-100) / E4M3_MAX
    data = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view_as(padded)[:rows, :cols].contiguous()
    return data, mn_major(scales) if block_rows == 1 else scales


def mn_major(scales: torch.Tensor, alignment: int = 4) -> torch.Tensor:
    """The same scales, each column contiguous and `alignment` elements aligned."""
    rows, cols = scales.shape
    pitch = -(-rows // alignment) * alignment
    storage = torch.zeros(cols, pitch, dtype=scales.dtype, device=scales.device)
    storage[:, :rows] = scales.t()
    return storage.t()[:rows]


def dequantize(data: torch.Tensor, scales: torch.Tensor, block_rows: int) -> torch.Tensor:
    rows, cols = data.shape
    wide = scales.repeat_interleave(BLOCK, 1)[:, :cols]
    return data.float() * (wide if block_rows == 1 else wide.repeat_interleave(block_rows, 0)[:rows])


def make_weights(n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights [N, K], quantised."""
    return quantize(torch.randn(n, k, device=generator.device, generator=generator) * k**-0.5, BLOCK)


def make_layers(count: int, seed: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The decode chain: for each of `count` layers its own weights of the group's (N, K), 231 MB a layer."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        [make_weights(shape.n, shape.k, generator) for shape in load_shapes(groups=("decode",))] for _ in range(count)
    ]


class Problem:
    """The operands of one product: normal activations and weights, quantised."""

    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
        device: str = "cuda",
        weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        generator = torch.Generator(device).manual_seed(seed)
        self.shape = shape
        x = torch.randn(shape.m, shape.k, device=device, generator=generator)
        self.a, self.sfa = quantize(x, 1)
        self.b, self.sfb = weights or make_weights(shape.n, shape.k, generator)
        self.out = torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=device)

    @cached_property
    def reference(self) -> torch.Tensor:
        """FP32 product of the dequantised operands."""
        return dequantize(self.a, self.sfa, 1) @ dequantize(self.b, self.sfb, BLOCK).t()

    def error_of(self, out: torch.Tensor) -> float:
        """Norm of the difference over the norm of the reference; NaN if anything was not written."""
        return float((out.float() - self.reference).norm() / self.reference.norm())

    def forget_reference(self) -> None:
        """Gives its memory back."""
        self.__dict__.pop("reference", None)

    def check(self, call, out: torch.Tensor) -> float:
        """Runs `call` on a poisoned output and returns the error."""
        out.fill_(float("nan"))
        call()
        if out.is_cuda:
            torch.cuda.synchronize()
        return self.error_of(out)
