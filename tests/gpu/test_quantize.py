"""quantize and dequantize on the GPU: the bytes that docs/numerics.md defines, which are those of the CPU."""

import random

import numpy as np
import phalanx
import pytest
from cases import DequantizeCase, QuantizeCase, TransposedCase

torch = pytest.importorskip("torch")

SIZES = [(0, 128), (1, 1), (3, 128), (130, 300), (257, 513), (128, 1024), (1000, 7168), (2056, 2048)]


def run(case, arrays):
    inputs = case.make(arrays)
    case.run(inputs)
    torch.cuda.synchronize()
    case.check(inputs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("block_rows", [1, 128])
@pytest.mark.parametrize("values", ["normal", "edges", "bits"])
def test_quantize(arrays, size, dtype, block_rows, values):
    for pow2_scales in (False, True):
        run(QuantizeCase(*size, dtype, block_rows, pow2_scales, values=values), arrays)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("block_rows", [1, 128])
def test_dequantize(arrays, size, dtype, block_rows):
    run(DequantizeCase(*size, dtype, block_rows, pad=5), arrays)


def run_transposed(case, arrays):
    inputs = case.make(arrays)
    case.check(inputs, case.run(inputs))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("values", ["normal", "edges", "bits"])
def test_transposed_and_both(arrays, size, dtype, values):
    for pow2_scales in (False, True):
        run_transposed(TransposedCase(*size, dtype, pow2_scales, values=values), arrays)


def test_random_sizes(arrays, seed):
    rng = random.Random(seed)
    for _ in range(150):
        size, pad = (rng.randint(1, 600), rng.randint(1, 1500)), rng.randint(0, 9)
        dtype, block_rows, layout = rng.choice(("bf16", "f16", "f32")), rng.choice((1, 128)), rng.choice(("mn", "k"))
        values, pow2 = rng.choice(("normal", "edges", "bits")), rng.random() < 0.5
        run(QuantizeCase(*size, dtype, block_rows, pow2, layout, pad, values, seed), arrays)
        run(DequantizeCase(*size, dtype, block_rows, layout, pad, seed), arrays)
        run_transposed(TransposedCase(*size, dtype, pow2, layout, pad, values, seed), arrays)


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_the_bytes_of_the_cpu(arrays, block):
    """All 65536 values of BF16 and FP16, in blocks of neighbours and shuffled."""
    shuffle = np.random.default_rng(0).permutation(65536)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(dtype)
        for x in (values.view(512, 128), values[torch.from_numpy(shuffle)].view(128, 512)):
            cpu, gpu = phalanx.quantize(x, block), phalanx.quantize(x.cuda(), block)
            assert torch.equal(gpu.data.cpu().view(torch.uint8), cpu.data.view(torch.uint8))
            assert torch.equal(gpu.scales.cpu().view(torch.int32), cpu.scales.view(torch.int32))
