"""Tokens to their experts and back on the GPU: the integers, bytes and sums that the CPU gets."""

import phalanx
import pytest
from cases import MoeCase, random_moe_cases
from cases.moe import EDGES

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(arrays, case):
    case.run_and_check(arrays)


def test_random(arrays, seed):
    for case in random_moe_cases(60, seed, tokens=200, hidden=1500):
        case.run_and_check(arrays)


@pytest.mark.parametrize("choices", ["random", "distinct", "skewed", "one"])
def test_many_tokens(arrays, choices):
    """Routed by a cluster; more rows than one wave of warps."""
    MoeCase(3000, 256, 8, 512, choices=choices, index="int32").run_and_check(arrays)
    MoeCase(9000, 32, 7, 256, choices=choices, data="bf16", alignment=128, capacity=60000).run_and_check(arrays)
    MoeCase(6000, 40, 4, 256, choices=choices, max_rows=500).run_and_check(arrays)


def test_same_bits_every_time(arrays):
    generator = torch.Generator("cuda").manual_seed(0)
    topk_idx = torch.randint(-1, 64, (5000, 8), device="cuda", generator=generator)
    x = torch.randn(5000, 512, device="cuda", generator=generator).bfloat16()
    weights = torch.rand(5000, 8, device="cuda", generator=generator)

    def run():
        rows, routing = phalanx.route_and_permute(x, topk_idx, 64)
        grads = phalanx.unpermute_backward(x, routing, weights, rows)
        return rows, *routing[:5], phalanx.unpermute(rows, routing, weights), *grads

    first = run()
    for _ in range(50):
        assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


@pytest.mark.parametrize("tokens", [64, 4096])
def test_graph(arrays, tokens):
    """Captured once, replayed with other routings."""
    generator = torch.Generator("cuda").manual_seed(0)
    topk_idx = torch.randint(-1, 32, (tokens, 8), device="cuda", generator=generator)
    x = torch.randn(tokens, 512, device="cuda", generator=generator).bfloat16()

    def run():
        rows, routing = phalanx.route_and_permute(x, topk_idx, 32)
        return (*routing[:5], rows, phalanx.unpermute(rows, routing))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        topk_idx.random_(-1, 32, generator=generator)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, run(), strict=True))


def test_cupy(arrays):
    cupy = pytest.importorskip("cupy")
    x, topk_idx = cupy.random.standard_normal((40, 64), cupy.float32), cupy.random.randint(0, 8, (40, 2))
    rows, routing = phalanx.route_and_permute(x, topk_idx, 8)
    assert (phalanx.unpermute(rows, routing) == x + x).all()


def test_jax(arrays):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    x = jax.numpy.arange(40 * 64, dtype=jax.numpy.float32).reshape(40, 64)
    topk_idx = jax.numpy.arange(80, dtype=jax.numpy.int32).reshape(40, 2) % 8
    rows, routing = phalanx.route_and_permute(x, topk_idx, 8)
    assert (phalanx.unpermute(rows, routing) == x + x).all()
