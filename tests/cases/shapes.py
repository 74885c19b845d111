"""Shapes: the named ones of shapes.json, and random ones."""

import json
import random
from pathlib import Path

Shape = tuple[int, int, int]  # M, N, K
BLOCK = 128


def num_blocks(n: int) -> int:
    return -(-n // BLOCK)


def shapes(*groups: str) -> list[Shape]:
    table = json.loads(Path(__file__).with_name("shapes.json").read_text())
    return [tuple(shape) for group in groups for shape in table[group]]


def random_shapes(count: int, seed: int, limit: int) -> list[Shape]:
    """Log-uniform up to `limit`; every other dimension is rounded to one of the kernels' own sizes."""
    rng = random.Random(seed)

    def dimension() -> int:
        n = round(2 ** rng.uniform(0, limit.bit_length() - 1))
        multiple = rng.choice((1, 1, 1, 8, 16, 64, 128))
        return min(limit, -(-n // multiple) * multiple)

    return [(dimension(), dimension(), dimension()) for _ in range(count)]
