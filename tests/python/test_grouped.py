"""The grouped products and weight gradients on the CPU, in NumPy and in PyTorch: every case within its bound."""

import random

import numpy as np
import phalanx
import pytest
from cases import GroupedGemmCase, GroupedSwigluCase, NumPyArrays, WgradCase

FORMS = ["offsets", "row_groups", "counts"]


def run(case, arrays):
    inputs = case.make(arrays)
    case.run(inputs)
    case.check(inputs)
    return inputs


def random_sizes(rng, count, limit):
    kind = rng.randrange(5)
    if kind == 0:
        return (0,) * count
    sizes = [rng.choice((0, 1, 2, rng.randrange(limit + 1))) for _ in range(count)]
    if kind == 1:  # one has all, the last perhaps
        return tuple(limit if g == rng.choice((count - 1, 0)) else 0 for g in range(count))
    return tuple(sizes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("values", ["normal", "exact", "bits"])
def test_groups_of_every_size(arrays, form, out, values):
    run(GroupedGemmCase((3, 0, 130, 1, 64, 0), 200, 300, form, out, values, gap=3, pad=1), arrays)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 0, 90), (70,), (1, 1, 1, 1)], ids=str)
def test_extremes(arrays, form, sizes):
    run(GroupedGemmCase(sizes, 136, 144, form, "f32", "exact", sfa_layout="k"), arrays)


def test_random_groups(arrays, seed):
    rng = random.Random(seed)
    for _ in range(20):
        case = GroupedGemmCase(
            random_sizes(rng, rng.randint(1, 9), 150),
            n=rng.randint(1, 300),
            k=rng.randint(1, 400),
            form=rng.choice(FORMS),
            out=rng.choice(("bf16", "f32")),
            values=rng.choice(("normal", "exact", "bits")),
            sfa_layout=rng.choice(("mn", "k")),
            pad=rng.randint(0, 3),
            max_rows=rng.choice((0, 200)),
            gap=rng.choice((0, 5)),
            seed=seed,
        )
        run(case, arrays)


def test_row_groups_in_any_order(arrays):
    """Groups may come in any order, each in one piece."""
    case = GroupedGemmCase((20, 0, 33), 128, 256, "row_groups", "f32", "exact")
    inputs = case.make(arrays)
    expected = arrays.to_numpy(case.run(inputs)).copy()
    order = np.r_[20:53, 0:20]
    shuffled = NumPyArrays().integers(np.array(case.groups())[order])
    a, sfa = (arrays.to_numpy(x)[order].copy() for x in (inputs.a, inputs.sfa))
    b, sfb = (arrays.to_numpy(x) for x in (inputs.b, inputs.sfb))
    d = phalanx.grouped_gemm_fp8_indexed((a, sfa), (b, sfb), shuffled, out_dtype=np.float32)
    np.testing.assert_array_equal(d, expected[order])


@pytest.mark.parametrize("form", FORMS)
def test_batch_invariant(arrays, form):
    """Within the bound too; and a row has the bits that a product of it alone has."""
    case = GroupedGemmCase((33, 0, 7, 1), 136, 300, form, "f32")
    inputs = case.make(arrays)
    rows = arrays.to_numpy(case.run(inputs, batch_invariant=True)).reshape(-1, case.n).copy()
    case.check(inputs)
    a, sfa = (x.reshape(-1, x.shape[-1]) for x in (inputs.a, inputs.sfa))
    for g, (begin, end) in enumerate(inputs.ranges):
        for row in {begin, (begin + end) // 2, end - 1} if begin < end else ():
            operands = (a[row : row + 1], sfa[row : row + 1]), (inputs.b[g], inputs.sfb[g])
            alone = phalanx.gemm_fp8(*operands, out_dtype=arrays.dtype("f32"), batch_invariant=True)
            np.testing.assert_array_equal(arrays.to_numpy(alone)[0], rows[row])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("values", ["normal", "exact", "bits", "scales"])
@pytest.mark.parametrize("sfa_layout", ["mn", "k"])
def test_wgrad(arrays, accumulate, values, sfa_layout):
    run(WgradCase(70, 200, 300, accumulate=accumulate, values=values, sfa_layout=sfa_layout, pad=1), arrays)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes", [(128, 256), (100, 0, 28, 1, 300, 7), (0, 0), (5, 6, 7), (0, 500)], ids=str)
def test_grouped_wgrad(arrays, accumulate, sizes):
    for gap in (0, 37):
        k = sum(sizes) + 2 * gap + 16
        run(WgradCase(70, 130, k, sizes=sizes, gap=gap, accumulate=accumulate, values="exact"), arrays)
        run(WgradCase(5, 200, k, sizes=sizes, gap=gap, accumulate=accumulate), arrays)


def test_random_gradients(arrays, seed):
    rng = random.Random(seed)
    for _ in range(12):
        run(WgradCase.random(rng, random_sizes(rng, rng.randint(1, 6), 300), 200, seed), arrays)


# --- what they return, and what they refuse ---------------------------------------------------------------------------


@pytest.fixture
def operands():
    inputs = GroupedGemmCase((3, 0, 4), 128, 256).make(NumPyArrays())
    return (inputs.a, inputs.sfa), (inputs.b, inputs.sfb)


def test_new_outputs(operands):
    a, b = operands
    offsets = np.array([0, 3, 3, 7], np.int32)
    d = phalanx.grouped_gemm_fp8(a, b, offsets)
    assert d.shape == (7, 128) and d.dtype.name == "bfloat16"
    np.testing.assert_array_equal(phalanx.grouped_gemm_fp8(a, b, offsets, num_sms=3, expected_rows=5), d)
    assert phalanx.grouped_gemm_fp8(a, b, offsets, out_dtype=np.float32).dtype == np.float32
    gradient = phalanx.wgrad_fp8(a, a)
    assert gradient.shape == (7, 7) and gradient.dtype == np.float32 and gradient.strides == (32, 4)
    each = phalanx.grouped_wgrad_fp8(a, a, np.array([0, 100, 256], np.int32))
    assert each.shape == (2, 7, 7)
    # Scales of the block that the groups share serve both.
    np.testing.assert_allclose(each.sum(0), gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4, 3, 7], r"offsets\[2\] is 3; expected at least 4"),
        ([0, 3, 3, 8], r"offsets\[3\] is 8; expected at least 3, at most 7"),
        ([-1, 3, 3, 7], r"offsets\[0\] is -1"),
    ],
)
def test_bad_offsets(operands, offsets, message):
    a, b = operands
    out = np.full((7, 128), 7, np.float32)
    with pytest.raises(ValueError, match=message):
        phalanx.grouped_gemm_fp8(a, b, np.array(offsets, np.int32), out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("row_groups", "message"),
    [
        ([0, 0, 3, 1, 1, 1, 1], r"row_groups\[2\] is 3; expected -1 to 2"),
        ([0, 1, 0, 1, 1, 1, 1], r"row_groups\[2\] is 0; expected the rows of each group to lie together"),
        ([-2, 0, 0, 1, 1, 1, 1], r"row_groups\[0\] is -2"),
    ],
)
def test_bad_row_groups(operands, row_groups, message):
    with pytest.raises(ValueError, match=message):
        phalanx.grouped_gemm_fp8_indexed(*operands, np.array(row_groups, np.int32))


@pytest.mark.parametrize("count", [-1, 5])
def test_bad_counts(count):
    inputs = GroupedGemmCase((3, 4), 128, 256, "counts").make(NumPyArrays())
    with pytest.raises(ValueError, match=rf"counts\[1\] is {count}; expected 0 to 4"):
        phalanx.grouped_gemm_fp8_masked((inputs.a, inputs.sfa), (inputs.b, inputs.sfb), np.array([3, count], np.int32))


def test_wrong_arguments(operands):
    (a, sfa), (b, sfb) = operands
    offsets = np.array([0, 3, 3, 7], np.int32)
    grouped = phalanx.grouped_gemm_fp8
    with pytest.raises(ValueError, match=r"a\.scales.*\[7, 1\].*expected shape \[7, 2\]"):
        grouped((a, sfa[:, :1]), (b, sfb), offsets)
    with pytest.raises(ValueError, match=r"b\.scales.*\[3, 2, 2\].*expected shape \[3, 1, 2\]"):
        grouped((a, sfa), (b, np.ones((3, 2, 2), np.float32)), offsets)
    with pytest.raises(ValueError, match=r"offsets.*expected shape \[4\], that is \[G \+ 1\]"):
        grouped((a, sfa), (b, sfb), offsets[:3])
    with pytest.raises(TypeError, match=r"offsets.*int64.*expected dtype int32"):
        grouped((a, sfa), (b, sfb), offsets.astype(np.int64))
    with pytest.raises(ValueError, match=r"offsets.*stride is 2"):
        grouped((a, sfa), (b, sfb), np.zeros(8, np.int32)[::2])
    with pytest.raises(ValueError, match=r"b\.data.*2 dimensions, expected 3"):
        grouped((a, sfa), (b[0], sfb[0]), offsets, out=np.empty((7, 128), np.float32))
    with pytest.raises(ValueError, match=r"shapes.*expected \[M, K\]"):
        grouped((a, sfa), (b[0], sfb[0]), offsets)
    with pytest.raises(ValueError, match=r"d is.*\[7, 120\].*expected shape \[7, 128\]"):
        grouped((a, sfa), (b, sfb), offsets, out=np.empty((7, 120), np.float32))
    with pytest.raises(ValueError, match="expected_rows"):
        grouped((a, sfa), (b, sfb), offsets, expected_rows=-1)
    with pytest.raises(ValueError, match="out_dtype"):
        grouped((a, sfa), (b, sfb), offsets, out=np.empty((7, 128), np.float32), out_dtype=b.dtype)
    with pytest.raises(ValueError, match=r"d is.*overlaps.*offsets"):
        memory = np.zeros((7, 128), np.float32)
        grouped((a, sfa), (b, sfb), memory.view(np.int32)[0, :4], out=memory)
    with pytest.raises(ValueError, match=r"b\.data.*group stride is 32768.*multiple of the row stride 272"):
        wide = np.zeros((3, 32768), np.uint8)
        rows = np.ndarray((3, 3, 256), np.uint8, wide, strides=(32768, 272, 1)).view(b.dtype)
        grouped((a, sfa), (rows, np.ones((3, 1, 2), np.float32)), offsets)
    with pytest.raises(ValueError, match="accumulate"):
        phalanx.wgrad_fp8((a, sfa), (a, sfa), accumulate=True)
    with pytest.raises(ValueError, match=r"b\.scales.*expected shape \[7, 2\], that is \[N, ceil"):
        phalanx.wgrad_fp8((a, sfa), (a, sfa[:1]))
    with pytest.raises(ValueError, match=r"d is.*G is 0, expected 1 to 512"):
        phalanx.grouped_wgrad_fp8((a, sfa), (a, sfa), offsets[:1], out=np.empty((0, 7, 8), np.float32)[:, :, :7])
    with pytest.raises(ValueError, match=r"offsets: shape \[1\]; expected \[G \+ 1\]"):
        phalanx.grouped_wgrad_fp8((a, sfa), (a, sfa), offsets[:1])
    for wrong in (None, [0, 7]):
        with pytest.raises(TypeError, match="offsets: expected an array"):
            grouped((a, sfa), (b, sfb), wrong)
        with pytest.raises(TypeError, match="offsets: expected an array"):
            phalanx.grouped_wgrad_fp8((a, sfa), (a, sfa), wrong)
    phalanx.check_groups(a)


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


def swiglu_case(sizes, intermediate, k, *, gap=0, sfa_layout="mn", **how):
    return GroupedSwigluCase(
        GroupedGemmCase(sizes, 2 * intermediate, k, values="normal", sfa_layout=sfa_layout, pad=1, gap=gap), **how
    )


@pytest.mark.parametrize("sizes", [(3, 0, 130, 1, 0), (0, 0, 0), (1,), (70,)], ids=str)
@pytest.mark.parametrize("room", [False, True])
def test_swiglu_gives_the_bytes_of_two_calls(arrays, sizes, room):
    swiglu_case(sizes, 256, 300, gap=3, room=room).check(arrays)
    swiglu_case(sizes, 128, 144, limit=0.5, weighted=True, pow2_scales=True, sfa_layout="k").check(arrays)
    swiglu_case(sizes, 128, 300, gap=3, room=room).check(arrays, batch_invariant=True)


def test_wrong_arguments_of_swiglu():
    inputs = GroupedGemmCase((3, 4), 256, 128).make(NumPyArrays())
    a, b, offsets = (inputs.a, inputs.sfa), (inputs.b, inputs.sfb), inputs.groups

    def fails(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            phalanx.grouped_gemm_fp8_swiglu(*args, **options)

    fails(r"b\.data.*N is 128, expected a multiple of 256", a, (b[0][:, :128], b[1][:, :1]), offsets)
    fails(r"offsets.*expected shape \[3\]", a, b, offsets[:2])
    fails(r"limit is -1, expected more than 0", a, b, offsets, limit=-1)
    fails(r"weights.*expected shape \[7\]", a, b, offsets, np.ones(6, np.float32))
    fails(r"weights.*float64", a, b, offsets, np.ones(7), error=TypeError)
    room = np.zeros((7, 256), np.float32)
    fails(r"gates_and_ups.*expected dtype bf16", a, b, offsets, gates_and_ups=room, error=TypeError)
    q = phalanx.grouped_gemm_fp8_swiglu(a, b, offsets)
    fails(r"q\.scales.*expected shape \[7, 1\]", a, b, offsets, out=(q.data, q.scales[:3]))
    fails(r"q\.data.*expected shape \[7, 128\]", a, b, offsets, out=(q.data[:3], q.scales))
    fails(r"expected \[M, K\] and \[G, 2 I, K\]", a, (b[0][0], b[1][0]), offsets)


# --- PyTorch's operators ----------------------------------------------------------------------------------------------


def test_torch_compile_and_fakes():
    torch = pytest.importorskip("torch")
    from cases import TorchArrays

    arrays = TorchArrays("cpu")
    inputs = GroupedGemmCase((3, 0, 4), 130, 256).make(arrays)
    a, b = (inputs.a, inputs.sfa), (inputs.b, inputs.sfb)

    def step(offsets, out):
        phalanx.grouped_wgrad_fp8(a, a, offsets[:3], out=out, accumulate=True)
        d = phalanx.grouped_gemm_fp8(a, b, offsets, out_dtype=torch.float32)
        return d * 2, out + phalanx.wgrad_fp8(a, a)

    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    outs = [torch.ones(2, 7, 8)[:, :, :7] for _ in range(2)]
    expected = step(offsets, outs[0])
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(offsets, outs[1])
    for x, y in zip((*actual, outs[1]), (*expected, outs[0]), strict=True):
        assert torch.equal(x, y)

    gates_and_ups = GroupedGemmCase((3, 0, 4), 256, 256).make(arrays)
    operands = gates_and_ups.a, gates_and_ups.sfa, gates_and_ups.b, gates_and_ups.sfb, offsets
    swiglu = lambda a, sfa, b, sfb, offsets: phalanx.grouped_gemm_fp8_swiglu((a, sfa), (b, sfb), offsets, limit=7.0)  # noqa: E731
    actual = torch.compile(swiglu, fullgraph=True, backend="aot_eager")(*operands)
    for x, y in zip(actual, swiglu(*operands), strict=True):
        assert torch.equal(x.float(), y.float())

    tests, ops = ("test_faketensor", "test_autograd_registration"), torch.ops.phalanx
    torch.library.opcheck(ops.grouped_gemm_fp8.default, (*a, *b, offsets), test_utils=tests)
    torch.library.opcheck(ops.grouped_gemm_fp8_swiglu.default, (*operands, None, 7.0, False), test_utils=tests)
    torch.library.opcheck(ops.wgrad_fp8.default, (*a, *a), test_utils=tests)
    torch.library.opcheck(ops.grouped_wgrad_fp8.default, (*a, *a, offsets[:3]), test_utils=tests)
    masked = GroupedGemmCase((3, 0, 4), 130, 256, "counts").make(arrays)
    operands = (masked.a, masked.sfa, masked.b, masked.sfb, masked.groups)
    torch.library.opcheck(ops.grouped_gemm_fp8_masked.default, operands, test_utils=tests)
