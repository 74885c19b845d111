"""The BF16 products on the GPU: every case within its bound; streams, graphs and gradients."""

import random

import phalanx
import pytest
from cases import GemmBf16Case, GroupedBf16Case, WgradBf16Case, random_shapes, shapes

torch = pytest.importorskip("torch")

FORMS = ["offsets", "row_groups", "counts"]
MAJORS = ["k", "mn"]


def run(case, arrays, **options):
    inputs = case.make(arrays)
    case.run(inputs, **options)
    torch.cuda.synchronize()
    case.check(inputs)
    return inputs


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()


@pytest.mark.parametrize("shape", shapes("small", "odd", "edge", "decode"), ids=str)
@pytest.mark.parametrize("out", ["bf16", "f32"])
def test_shapes(arrays, shape, out):
    run(GemmBf16Case(*shape, out), arrays)
    run(GemmBf16Case(*shape, out, values="exact"), arrays)


@pytest.mark.parametrize("m", [1, 130, 300, 1000])
@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("c", ["none", "apart", "alias"])
@pytest.mark.parametrize("major_a", MAJORS)
@pytest.mark.parametrize("major_b", MAJORS)
def test_majors_and_c(arrays, m, out, c, major_a, major_b):
    for n, k in ((200, 300), (1000, 1027)):
        run(GemmBf16Case(m, n, k, out, c, pad=1, major_a=major_a, major_b=major_b, values="exact"), arrays)
        run(GemmBf16Case(m, n, k, out, c, major_a=major_a, major_b=major_b), arrays)


def test_random_shapes(arrays, seed):
    rng = random.Random(seed)
    for shape in random_shapes(200, seed, 3000):
        case = GemmBf16Case(
            *shape,
            out=rng.choice(("bf16", "f32")),
            c=rng.choice(("none", "apart", "alias")),
            pad=rng.randint(0, 3),
            values=rng.choice(("normal", "exact")),
            major_a=rng.choice(MAJORS),
            major_b=rng.choice(MAJORS),
            seed=seed,
        )
        run(case, arrays, num_sms=rng.choice((0, 0, 1, 50)), batch_invariant=rng.random() < 0.3)


def test_random_groups(arrays, seed):
    rng = random.Random(seed)
    for _ in range(60):
        limit = rng.choice((9, 100, 400))
        sizes = tuple(rng.choice((0, rng.randint(1, limit))) for _ in range(rng.randint(1, 20)))
        gap, values = rng.choice((0, 5)), rng.choice(("normal", "exact"))
        n, k = rng.choice((rng.randint(1, 700), 128 * rng.randint(1, 6))), rng.randint(1, 1000)
        common = {"gap": gap, "pad": rng.randint(0, 3), "values": values, "seed": seed}
        num_sms = rng.choice((0, 0, 1, 77))
        out, major = rng.choice(("bf16", "f32")), rng.choice(MAJORS)
        case = GroupedBf16Case(sizes, n, k, rng.choice(FORMS), out, major_b=major, **common)
        run(case, arrays, expected_rows=rng.choice((0, 1, 5000)), num_sms=num_sms)
        tokens = sum(sizes) + 2 * gap + rng.randint(1, 100)
        wgrad = WgradBf16Case(min(k, 400), n, tokens, sizes=sizes, accumulate=rng.random() < 0.5, **common)
        run(wgrad, arrays, num_sms=num_sms)
    phalanx.check_groups(torch.empty(0, device="cuda"))


def test_a_row_does_not_depend_on_the_others(arrays):
    inputs = GemmBf16Case(300, 512, 2048).make(arrays)
    a, b = inputs.a.array, inputs.b.array
    together = bits(phalanx.gemm_bf16(a, b, batch_invariant=True))
    experts = b[None].expand(1, -1, -1)
    for first, count in ((0, 1), (7, 1), (63, 70), (128, 172)):
        rows = slice(first, first + count)
        assert torch.equal(bits(phalanx.gemm_bf16(a[rows], b, batch_invariant=True)), together[rows])
        offsets = arrays.integers([0, count])
        assert torch.equal(bits(phalanx.grouped_gemm_bf16(a[rows], experts, offsets)), together[rows])


def test_same_bits_each_time(arrays):
    for shape in ((64, 2112, 7168), (1000, 2112, 1024)):
        inputs = GemmBf16Case(*shape).make(arrays)
        expected = bits(phalanx.gemm_bf16(inputs.a.array, inputs.b.array))
        for _ in range(20):
            assert torch.equal(bits(phalanx.gemm_bf16(inputs.a.array, inputs.b.array)), expected)


def test_graph_replays_with_new_inputs(arrays):
    first, second = (GemmBf16Case(128, 2112, 1024, c="apart", seed=seed) for seed in (1, 2))
    inputs, new = first.make(arrays), second.make(arrays)
    first.run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.run(inputs)
    for name in ("a", "b", "c"):
        getattr(inputs, name).memory.copy_(getattr(new, name).memory)
    inputs.c_before = new.c_before
    inputs.out.memory.fill_(0xFF)
    graph.replay()
    torch.cuda.synchronize()
    second.check(inputs)


def test_gradients_and_compile(arrays):
    make = lambda *shape: torch.randn(*shape, device="cuda").bfloat16().requires_grad_()  # noqa: E731
    x, w, experts = make(300, 512), make(264, 512), make(3, 512, 264)
    offsets = torch.tensor([0, 100, 100, 300], dtype=torch.int32, device="cuda")

    def layer(x, w, experts):
        return phalanx.grouped_gemm_bf16(phalanx.gemm_bf16(x, w), experts, offsets).float().square().mean()

    def reference(x, w, experts):
        h = x @ w.t()
        return torch.cat([h[:100] @ experts[0].t(), h[100:] @ experts[2].t()]).float().square().mean()

    wanted = torch.autograd.grad(reference(x, w, experts), (x, w, experts))
    for function in (layer, torch.compile(layer, fullgraph=True)):
        for ours, exact in zip(torch.autograd.grad(function(x, w, experts), (x, w, experts)), wanted, strict=True):
            error = (ours.double() - exact.double()).norm() / exact.double().norm()
            assert error < 1e-2
