"""The grouped products and weight gradients on the GPU: every case within its bound; groups only the device knows."""

import math
import random

import numpy as np
import phalanx
import pytest
from cases import GroupedGemmCase, GroupedSwigluCase, WgradCase

torch = pytest.importorskip("torch")

FORMS = ["offsets", "row_groups", "counts"]
EXPERTS = [(4096, 7168), (7168, 2048), (3072, 4096), (768, 2048)]


def run(case, arrays, **options):
    inputs = case.make(arrays)
    case.run(inputs, **options)
    torch.cuda.synchronize()
    case.check(inputs)
    phalanx.check_groups(inputs.a.array if isinstance(case, WgradCase) else inputs.a)
    return inputs


def random_sizes(rng, count, limit):
    """Groups as routing makes them, and as it should not: most empty, all on one, all on the last, none at all."""
    kind = rng.randrange(7)
    if kind == 0:
        return (0,) * count
    if kind <= 2:
        one = count - 1 if kind == 1 else rng.randrange(count)
        return tuple(limit * 3 if g == one else 0 for g in range(count))
    if kind == 3:
        return tuple(rng.choice((0, 0, 0, rng.randint(1, limit))) for _ in range(count))
    return tuple(rng.randint(0, limit) for _ in range(count))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("values", ["normal", "exact", "bits"])
@pytest.mark.parametrize("sfa_layout", ["mn", "k"])
def test_groups_of_every_size(arrays, form, out, values, sfa_layout):
    sizes = (3, 0, 130, 1, 64, 0, 257, 128)
    run(GroupedGemmCase(sizes, 200, 1000, form, out, values, sfa_layout, pad=1, gap=3), arrays)


@pytest.mark.parametrize("n_k", EXPERTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_real_experts(arrays, n_k, form):
    run(GroupedGemmCase((300, 0, 17, 600), *n_k, form=form), arrays)
    run(GroupedGemmCase((16,) * 6, *n_k, form=form, values="exact", max_rows=40), arrays)


@pytest.mark.parametrize("form", FORMS)
def test_many_groups(arrays, form, seed):
    rng = random.Random(seed)
    run(GroupedGemmCase(random_sizes(rng, 512, 9), 64, 128, form, "f32", "exact", seed=seed), arrays)
    run(GroupedGemmCase(tuple(rng.choice((0, 1, 70)) for _ in range(300)), 136, 256, form, values="exact"), arrays)


def test_random_groups(arrays, seed):
    rng = random.Random(seed)
    for _ in range(150):
        case = GroupedGemmCase(
            random_sizes(rng, rng.randint(1, 20), rng.choice((9, 100, 400))),
            n=rng.choice((rng.randint(1, 700), 128 * rng.randint(1, 6))),
            k=rng.randint(1, 1500),
            form=rng.choice(FORMS),
            out=rng.choice(("bf16", "f32")),
            values=rng.choice(("normal", "exact", "bits")),
            sfa_layout=rng.choice(("mn", "k")),
            pad=rng.randint(0, 3),
            max_rows=rng.choice((0, 500)),
            gap=rng.choice((0, 5)),
            seed=seed,
        )
        run(case, arrays, expected_rows=rng.choice((0, 1, 100, 5000)), num_sms=rng.choice((0, 0, 1, 3, 77)))


def test_thousands_of_group_sizes(arrays, seed):
    """The same operands, other offsets: rows of ones times experts of one number each: D says which expert it met."""
    rng, groups, rows = random.Random(seed), 40, 3000
    one = torch.ones(rows, 128, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.ones(rows, 1, device="cuda")
    b = torch.zeros(groups, 192, 128, device="cuda").to(torch.float8_e4m3fn)
    b.view(torch.uint8)[:, :, 0] = torch.ones(1).to(torch.float8_e4m3fn).view(torch.uint8).item()
    sfb = torch.arange(groups, device="cuda", dtype=torch.float32)[:, None, None].repeat(1, 2, 1)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(2000):
        sizes = random_sizes(rng, groups, rng.choice((3, 60)))
        offsets = np.minimum(np.cumsum([rng.randint(0, 9), *sizes]), rows)
        out = torch.full((rows, 192), -1.0, device="cuda", dtype=(torch.bfloat16, torch.float32)[i % 2])
        on_device = torch.from_numpy(offsets.astype(np.int32)).cuda()
        phalanx.grouped_gemm_fp8((one, scales), (b, sfb), on_device, out=out, expected_rows=rng.choice((0, 1, 999)))
        row = torch.arange(rows, device="cuda", dtype=torch.int32)
        expert = torch.searchsorted(on_device, row, right=True) - 1
        expert = torch.where((expert < 0) | (expert >= groups), -1, expert)
        wrong += (out != expert[:, None]).sum()
    assert wrong.item() == 0


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


def swiglu_case(sizes, intermediate, k, *, gap=0, values="normal", sfa_layout="mn", **how):
    return GroupedSwigluCase(
        GroupedGemmCase(sizes, 2 * intermediate, k, values=values, sfa_layout=sfa_layout, pad=1, gap=gap), **how
    )


@pytest.mark.parametrize("sizes", [(3, 0, 130, 1, 64, 0, 257, 128), (0, 0, 0), (1,), (600, 0)], ids=str)
@pytest.mark.parametrize("sfa_layout", ["mn", "k"])
def test_swiglu_gives_the_bytes_of_two_calls(arrays, sizes, sfa_layout):
    for room in (False, True):
        swiglu_case(sizes, 384, 1000, gap=3, sfa_layout=sfa_layout, room=room).check(arrays)
        how = {"limit": 0.5, "weighted": True, "pow2_scales": True, "room": room}
        swiglu_case(sizes, 128, 144, values="bits", sfa_layout=sfa_layout, **how).check(arrays)
    phalanx.check_groups(torch.empty(0, device="cuda"))


@pytest.mark.parametrize("n_k", [(2048, 7168), (1536, 4096), (768, 2048)], ids=str)
def test_swiglu_of_real_experts(arrays, n_k):
    for sizes in ((300, 0, 17, 600), (16,) * 6, (1, 0, 2)):
        swiglu_case(sizes, *n_k).check(arrays)


def test_swiglu_of_random_groups(arrays, seed):
    rng = random.Random(seed)
    for _ in range(20):
        swiglu_case(
            random_sizes(rng, rng.randint(1, 12), 300),
            128 * rng.randint(1, 4),
            rng.randint(1, 900),
            gap=rng.choice((0, 5)),
            sfa_layout=rng.choice(("mn", "k")),
            limit=rng.choice((None, 1.0)),
            weighted=rng.random() < 0.5,
        ).check(arrays, num_sms=rng.choice((0, 1, 5)), expected_rows=rng.choice((0, 4, 100)))


# --- weight gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("values", ["normal", "exact", "bits", "scales"])
@pytest.mark.parametrize("sfa_layout", ["mn", "k"])
def test_wgrad(arrays, accumulate, values, sfa_layout):
    run(WgradCase(270, 200, 1000, accumulate=accumulate, values=values, sfa_layout=sfa_layout, pad=1), arrays)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("gap", [0, 37])
@pytest.mark.parametrize("sizes", [(128, 256), (100, 0, 28, 1, 300, 7), (0, 0), (5, 6, 7), (0, 5000)], ids=str)
def test_grouped_wgrad(arrays, accumulate, sizes, gap):
    k = sum(sizes) + 2 * gap + 16
    for shape in ((270, 130), (5, 200), (128, 256)):
        run(WgradCase(*shape, k, sizes=sizes, gap=gap, accumulate=accumulate, values="exact"), arrays)
        run(WgradCase(*shape, k, sizes=sizes, gap=gap, accumulate=accumulate), arrays)


def test_gradients_of_real_experts(arrays):
    run(WgradCase(2048, 1536, 4096), arrays)
    run(WgradCase(1024, 1536, 3000, sizes=(1000, 24, 976, 1000), values="exact", accumulate=True), arrays)


def test_random_gradients(arrays, seed):
    rng = random.Random(seed)
    for _ in range(120):
        sizes = random_sizes(rng, rng.randint(1, 9), rng.choice((20, 700)))
        run(WgradCase.random(rng, sizes, 400, seed), arrays, num_sms=rng.choice((0, 0, 1, 50)))


def test_gradient_of_scales_that_are_not_finite(arrays):
    """As if each product of scales were one of FP32: infinity by a number is infinity, by 0 NaN."""
    case = WgradCase(200, 200, 300, values="scales")
    inputs = case.make(arrays)
    for x in (inputs.a.array, inputs.b.array):
        x.view(torch.uint8).fill_(0x38)  # 1
    few_bits_nan = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    for row, scale in ((3, math.inf), (5, math.nan), (64, 0.0), (70, few_bits_nan), (199, -math.inf)):
        inputs.sfa.array[row, 1] = inputs.sfb.array[row, 1] = scale
    case.run(inputs)
    sfa, sfb = inputs.sfa.array, inputs.sfb.array
    weights = torch.tensor([128.0, 128.0, 44.0], device="cuda")
    expected = (sfa[:, None, :] * sfb[None, :, :] * weights).sum(2)
    torch.testing.assert_close(inputs.out.array, expected, equal_nan=True, rtol=1e-5, atol=0)


def test_gradient_of_no_tokens(arrays):
    empty = torch.empty(64, 0, device="cuda").to(torch.float8_e4m3fn), torch.empty(64, 0, device="cuda")
    out = torch.ones(64, 64, device="cuda")
    phalanx.wgrad_fp8(empty, empty, out=out, accumulate=True)
    assert bool((out == 1).all())
    phalanx.wgrad_fp8(empty, empty, out=out)
    assert bool((out == 0).all())


# --- how it behaves ---------------------------------------------------------------------------------------------------


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()


def test_a_row_does_not_depend_on_the_others(arrays):
    """Nor on the kernel: each row's bits are those that it has alone."""
    case = GroupedGemmCase((300,), 512, 2048, values="normal")
    inputs = case.make(arrays)
    b, offsets = (inputs.b, inputs.sfb), arrays.integers([0, 300])
    together = bits(phalanx.grouped_gemm_fp8((inputs.a, inputs.sfa), b, offsets))
    for first, count in ((0, 1), (7, 1), (63, 70), (299, 1), (128, 172)):
        rows = slice(first, first + count)
        offsets = arrays.integers([0, count])
        for expected_rows in (1, 60, 128, 10000):
            for num_sms in (0, 5):
                alone = phalanx.grouped_gemm_fp8(
                    (inputs.a[rows], inputs.sfa[rows]), b, offsets, expected_rows=expected_rows, num_sms=num_sms
                )
                assert torch.equal(bits(alone), together[rows])
    stacked = inputs.a[None], inputs.sfa[None]
    assert torch.equal(bits(phalanx.grouped_gemm_fp8_masked(stacked, b, arrays.integers([300])))[0], together)


def test_same_bits_each_time(arrays):
    inputs = GroupedGemmCase((300, 0, 17, 600), 2048, 1024).make(arrays)
    operands = (inputs.a, inputs.sfa), (inputs.b, inputs.sfb), inputs.groups
    expected = bits(phalanx.grouped_gemm_fp8(*operands))
    for _ in range(20):
        assert torch.equal(bits(phalanx.grouped_gemm_fp8(*operands)), expected)


def test_graph_replays_with_other_group_sizes(arrays):
    first = GroupedGemmCase((300, 0, 17, 600), 512, 1024, values="exact", seed=1)
    inputs = first.make(arrays)
    gradient = torch.empty(4, 512, 512, device="cuda")
    x = phalanx.quantize(torch.randn(512, 917, device="cuda"))

    def step():
        phalanx.grouped_wgrad_fp8(x, x, inputs.groups, out=gradient)
        first.run(inputs)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for sizes in ((17, 300, 600, 0), (0, 0, 0, 917), (1, 2, 3, 911)):
        second = GroupedGemmCase(sizes, 512, 1024, values="exact", seed=2)
        new = second.make(arrays)
        for name in ("a", "sfa", "b", "sfb", "groups"):
            source, target = getattr(new, name), getattr(inputs, name)
            (target.view(torch.uint8) if target.dtype == torch.float8_e4m3fn else target).copy_(
                source.view(torch.uint8) if source.dtype == torch.float8_e4m3fn else source
            )
        inputs.d.memory.fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        inputs.ranges = new.ranges
        second.check(inputs)
        assert torch.equal(bits(gradient), bits(phalanx.grouped_wgrad_fp8(x, x, inputs.groups)))


@pytest.mark.parametrize(
    ("form", "bad", "message"),
    [
        ("offsets", [0, 20, 10, 40], r"offsets\[2\] = 10"),
        ("offsets", [0, 20, 30, 41], r"offsets\[3\] = 41"),
        ("offsets", [-5, 20, 30, 40], r"offsets\[0\] = -5"),
        ("offsets", [0, 1 << 30, -(1 << 31), 40], r"offsets"),
        ("counts", [20, -1, 3], r"counts\[1\] = -1"),
        ("counts", [20, 21, 3], r"counts\[1\] = 21"),
        ("row_groups", [0] * 20 + [3] + [1] * 19, r"row_groups\[20\] = 3"),
        ("row_groups", [0] * 20 + [1] * 10 + [0] * 10, r"row_groups"),
        ("row_groups", [-2] * 20 + [1] * 20, r"row_groups"),
    ],
    ids=str,
)
def test_bad_groups_are_clamped_and_reported(arrays, form, bad, message):
    case = GroupedGemmCase((20, 20, 0) if form == "counts" else (10, 10, 20), 128, 256, form)
    inputs = case.make(arrays)
    inputs.groups = arrays.integers(bad)
    case.run(inputs)
    torch.cuda.synchronize()
    inputs.d.check_guard()
    with pytest.raises(ValueError, match=message):
        case.run(inputs)
    case.run(inputs)  # said once; and found again
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=message):
        phalanx.check_groups(inputs.a)
    phalanx.check_groups(inputs.a)


def test_current_stream_and_no_wait(arrays):
    case = GroupedGemmCase((300, 0, 17), 512, 1024, values="exact")
    inputs = case.make(arrays)
    case.run(inputs)
    late = inputs.groups.clone()
    inputs.groups.zero_()
    inputs.d.memory.fill_(0xFF)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        inputs.groups.copy_(late)
        case.run(inputs)
    assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    case.check(inputs)
