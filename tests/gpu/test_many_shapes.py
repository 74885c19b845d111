"""gemm_fp8 over thousands of small random shapes and hundreds of large ones, bit for bit.

Operands are small integers and their scales 1 or 2, so that every sum is exact in any order (docs/numerics.md) and
FP64 gives the bits of D. They are views into pools of random bytes, at random 16-byte offsets and with padded rows; D
lies in poisoned memory, all of which is compared: an element that is wrong or missing shows, and so does one byte too
many.
"""

import math
import random

import phalanx
import pytest

torch = pytest.importorskip("torch")

POISON, GUARD_ROWS = 0xFF, 2
POOL = 160 << 20
CODES = [0x00, 0x38, 0x40, 0x44, 0x48, 0x4A, 0x4C, 0x4E, 0x50]  # 0, 1, 2, 3, 4, 5, 6, 7, 8


class Pools:
    """Random operands, made once."""

    def __init__(self, seed: int):
        generator = torch.Generator("cuda").manual_seed(seed)
        codes = torch.tensor(CODES + [code | 0x80 for code in CODES], dtype=torch.uint8, device="cuda")
        picks = torch.randint(len(codes), (POOL,), device="cuda", dtype=torch.int32, generator=generator)
        self.codes = codes[picks]
        self.scales = torch.randint(1, 3, (1 << 20,), device="cuda", generator=generator).float()
        self.integers = torch.randint(-8, 9, (8 << 20,), device="cuda", generator=generator).float()

    def matrix(self, rng, rows: int, cols: int):
        stride = (-(-cols // 16) + rng.choice((0, 0, 0, 1, 5))) * 16
        offset = rng.randrange(0, POOL - rows * stride, 16)
        return self.codes.as_strided((rows, cols), (stride, 1), offset).view(torch.float8_e4m3fn)

    def scales_of(self, rng, rows: int, k_blocks: int, mn_major: bool):
        pitch = -(-rows // 4) * 4 + rng.choice((0, 0, 4)) if mn_major else k_blocks + rng.choice((0, 0, 3))
        size = pitch * (k_blocks if mn_major else rows)
        offset = rng.randrange(0, len(self.scales) - size, 4)
        return self.scales.as_strided((rows, k_blocks), (1, pitch) if mn_major else (pitch, 1), offset)


def dequantized(data, scales, block_rows: int):
    rows, cols = data.shape
    wide = scales.double().repeat_interleave(128, 1)[:, :cols]
    if block_rows > 1:
        wide = wide.repeat_interleave(block_rows, 0)[:rows]
    return data.double() * wide


def poisoned(rows: int, row_bytes: int):
    return torch.full((rows + 2 * GUARD_ROWS, row_bytes), POISON, dtype=torch.uint8, device="cuda")


def inside(memory, rows: int, cols: int, dtype):
    return memory.view(dtype)[GUARD_ROWS : GUARD_ROWS + rows, :cols]


def check(pools, rng, m: int, n: int, k: int) -> None:
    dtype = rng.choice((torch.bfloat16, torch.float32))
    k_blocks = -(-k // 128)
    a, sfa = pools.matrix(rng, m, k), pools.scales_of(rng, m, k_blocks, rng.random() < 0.7)
    b, sfb = pools.matrix(rng, n, k), pools.scales_of(rng, -(-n // 128), k_blocks, rng.random() < 0.2)
    row_bytes = (-(-n * dtype.itemsize // 16) + rng.choice((0, 0, 1))) * 16
    expected, memory = poisoned(m, row_bytes), poisoned(m, row_bytes)
    out, c = inside(memory, m, n, dtype), None
    product = dequantized(a, sfa, 1) @ dequantized(b, sfb, 128).T + 0.0  # no negative zeros
    if rng.random() < 0.3:
        start = rng.randrange(len(pools.integers) - m * n)
        values = pools.integers[start : start + m * n].view(m, n)
        c = out if rng.random() < 0.5 else inside(poisoned(m, row_bytes), m, n, dtype)
        c.copy_(values)
        product += values
    inside(expected, m, n, dtype).copy_(product)  # through FP32, which is exact, then rounded once
    options = {"num_sms": rng.choice((0, 0, 0, 7, 100)), "batch_invariant": rng.random() < 0.2}
    options["constant_b"] = rng.random() < 0.5  # nothing that is under way writes it
    what = f"{m}x{n}x{k} {dtype}, C {'none' if c is None else 'D' if c is out else 'apart'}, {options}"

    before = None if c is None else c.clone()
    phalanx.gemm_fp8((a, sfa), (b, sfb), c=c, out=out, **options)
    assert torch.equal(memory, expected), what
    if c is not None:
        c.copy_(before)
    phalanx.gemm_fp8((a, sfa), (b, sfb), c=c, out=out, **options)
    assert torch.equal(memory, expected), f"{what}: other bits the second time"


def dimension(rng, least: int, limit: int) -> int:
    """Log-uniform; every other one is rounded to a size of the kernels' own, or to its neighbour."""
    size = round(math.exp(rng.uniform(math.log(least), math.log(limit))))
    multiple = rng.choice((1, 1, 1, 8, 64, 128))
    return max(1, min(limit, -(-size // multiple) * multiple + rng.choice((0, 0, 0, -1, 1))))


@pytest.fixture(scope="module")
def pools(arrays, seed):
    return Pools(seed)


@pytest.mark.parametrize(
    ("count", "m_range", "n_range", "k_range"),
    [
        pytest.param(5000, (1, 300), (1, 400), (1, 900), id="small"),
        pytest.param(1500, (1, 140), (1, 9000), (1, 3000), id="few_rows"),
        pytest.param(500, (200, 4200), (500, 8200), (300, 4100), id="large"),
        pytest.param(60, (1, 2100), (64, 4100), (8000, 17000), id="long_k"),
    ],
)
def test_random_shapes(pools, seed, count, m_range, n_range, k_range):
    rng = random.Random(f"{seed} {count}")
    for _ in range(count):
        m, n, k = (dimension(rng, *sizes) for sizes in (m_range, n_range, k_range))
        while m * n > 4 << 20:
            m, n = max(1, m // 2), n - n // 3
        check(pools, rng, m, n, k)


@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (24576, 1536), (7168, 2048), (576, 720), (4096, 7168)])
def test_batch_invariance(arrays, seed, n, k):
    """A row's bits are the same in a batch of 2000 and alone, wherever it stands and however many SMs there are."""
    rng = random.Random(seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(2000, k, device="cuda", generator=generator)
    a = phalanx.quantize(x)
    b = phalanx.quantize(torch.randn(n, k, device="cuda", generator=generator) * k**-0.5, (128, 128))
    for dtype in (torch.bfloat16, torch.float32):
        whole = phalanx.gemm_fp8(a, b, out_dtype=dtype, batch_invariant=True)
        for rows in (1, 2, 7, 16, 17, 64, 65, 127, 128, 129, 200, 256, 513, 1024, 1999):
            first = rng.randrange(0, 2000 - rows + 1)
            part = phalanx.quantize(x[first : first + rows])
            num_sms = rng.choice((0, 0, 5, 66, 131))
            d = phalanx.gemm_fp8(part, b, out_dtype=dtype, num_sms=num_sms, batch_invariant=True)
            same = torch.equal(d.view(torch.uint8), whole[first : first + rows].view(torch.uint8))
            assert same, (rows, first, num_sms, dtype)
