"""swiglu_quantize and swiglu_backward on the GPU: against FP64, and the bytes of the CPU."""

import random

import numpy as np
import phalanx
import pytest
from cases import NumPyArrays, SwigluCase
from cases.quantize import same_bytes
from cases.swiglu import random_swiglu_case, swiglu_cases

torch = pytest.importorskip("torch")

SIZES = [(0, 128), (1, 1), (3, 128), (130, 300), (33, 1030), (1, 2048), (2500, 768), (1000, 2048)]


def check_transposed(case, inputs, cpu):
    """The bytes of the CPU, which are only bounded by FP64."""
    results = []
    for each in (inputs, cpu):
        weights = None if each.weights is None else each.weights.array[0]
        options = (weights, case.limit, case.interleaved, case.pow2_scales)
        results.append([each.arrays.to_numpy(t) for t in phalanx.swiglu_quantize_both(each.x.array, *options)[1]])
    for actual, expected in zip(*results, strict=True):
        same_bytes(f"{case}: transposed", actual, expected)


def run(case, arrays):
    inputs, cpu = case.make(arrays), case.make(NumPyArrays())
    grad_weights = case.run(inputs)
    if case.values == "normal":
        case.check(inputs, grad_weights)
    case.run(cpu)
    for name in ("scales", "data", "grad_x"):
        actual, expected = getattr(inputs, name), getattr(cpu, name)
        same_bytes(f"{case}: {name}", arrays.to_numpy(actual.array), np.asarray(expected.array))
        actual.check_guard()
    if case.dtype == "bf16":
        case.check_both(inputs)
        check_transposed(case, inputs, cpu)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64_and_the_cpu(arrays, size, dtype):
    for case in swiglu_cases(*size, dtype):
        run(case, arrays)


@pytest.mark.parametrize("values", ["normal", "bits"])
def test_random_cases(arrays, seed, values):
    rng = random.Random(seed)
    for _ in range(100):
        run(random_swiglu_case(rng, 500, seed, values=values), arrays)


def test_every_bf16_gate(arrays):
    """Against the bytes of the CPU, in the neighbourhood of very different ups."""
    gates = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(torch.bfloat16).view(512, 128)
    generator = torch.Generator().manual_seed(0)
    ups = (torch.randn(512, 128, generator=generator) * torch.exp2(torch.arange(512.0)[:, None] % 64 - 32)).bfloat16()
    x, grad = torch.cat([gates, ups], 1), torch.randn(512, 128, generator=generator).bfloat16()
    for limit in (None, 10.0):
        cpu, gpu = (phalanx.swiglu_quantize(t, limit=limit) for t in (x, x.cuda()))
        for actual, expected in zip(gpu, cpu, strict=True):
            same_bytes(f"limit {limit}", arrays.to_numpy(actual), arrays.to_numpy(expected))
        cpu, gpu = (phalanx.swiglu_backward(g, t, limit=limit)[0] for g, t in ((grad, x), (grad.cuda(), x.cuda())))
        same_bytes(f"gradients, limit {limit}", arrays.to_numpy(gpu), arrays.to_numpy(cpu))


def test_same_weight_gradients_every_time(arrays):
    case = SwigluCase(300, 2048, weighted=True)
    inputs = case.make(arrays)
    first = case.run(inputs)
    for _ in range(3):
        assert torch.equal(case.run(inputs), first)
