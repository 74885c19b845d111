"""The BF16 products on the CPU, in NumPy and in PyTorch: every case within its bound; operators and gradients."""

import random

import ml_dtypes
import numpy as np
import phalanx
import pytest
from cases import GemmBf16Case, GroupedBf16Case, NumPyArrays, WgradBf16Case, random_shapes, shapes

FORMS = ["offsets", "row_groups", "counts"]
MAJORS = ["k", "mn"]


def run(case, arrays):
    inputs = case.make(arrays)
    case.run(inputs)
    case.check(inputs)
    return inputs


@pytest.mark.parametrize("shape", shapes("small", "odd", "edge"), ids=str)
def test_shapes(arrays, shape):
    run(GemmBf16Case(*shape), arrays)
    run(GemmBf16Case(*shape, "f32", major_a="mn", major_b="mn", values="exact"), arrays)


@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("c", ["none", "apart", "alias"])
@pytest.mark.parametrize("major_a", MAJORS)
@pytest.mark.parametrize("major_b", MAJORS)
def test_majors_and_c(arrays, out, c, major_a, major_b):
    run(GemmBf16Case(67, 200, 300, out, c, pad=1, major_a=major_a, major_b=major_b), arrays)


def test_random_shapes(arrays, seed):
    for i, shape in enumerate(random_shapes(24, seed, 400)):
        case = GemmBf16Case(
            *shape,
            out=("bf16", "f32")[i % 2],
            c=("none", "apart", "alias")[i % 3],
            pad=i % 4,
            values=("normal", "exact")[i // 2 % 2],
            major_a=MAJORS[i // 2 % 2],
            major_b=MAJORS[i // 4 % 2],
            seed=seed,
        )
        run(case, arrays)


def test_nan_reaches_what_it_takes_part_in(arrays):
    case = GemmBf16Case(5, 130, 200, "f32")
    inputs = case.make(arrays)
    inputs.a.array[1, 199] = inputs.b.array[129, 0] = float("nan")
    case.run(inputs)
    case.check(inputs)
    nan = np.isnan(arrays.to_numpy(inputs.out.array))
    assert nan[1].all() and nan[:, 129].all() and nan.sum() == 130 + 4


def test_batch_invariant(arrays):
    case = GemmBf16Case(40, 136, 300, "f32")
    inputs = case.make(arrays)
    whole = arrays.to_numpy(case.run(inputs, batch_invariant=True)).copy()
    for row in (0, 17, 39):
        a = inputs.a.array[row : row + 1]
        alone = phalanx.gemm_bf16(a, inputs.b.array, out_dtype=arrays.dtype("f32"), batch_invariant=True)
        np.testing.assert_array_equal(arrays.to_numpy(alone)[0], whole[row])


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_groups_batch_invariant(arrays, form):
    case = GroupedBf16Case((33, 0, 7, 1), 136, 300, form, "f32")
    inputs = case.make(arrays)
    rows = arrays.to_numpy(case.run(inputs, batch_invariant=True)).reshape(-1, case.n).copy()
    a = inputs.a.reshape(-1, case.k)
    for g, (begin, end) in enumerate(inputs.ranges):
        for row in {begin, (begin + end) // 2, end - 1} if begin < end else ():
            one = a[row : row + 1], inputs.b[g]
            alone = phalanx.gemm_bf16(*one, out_dtype=arrays.dtype("f32"), batch_invariant=True)
            np.testing.assert_array_equal(arrays.to_numpy(alone)[0], rows[row])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("major_b", MAJORS)
def test_groups_of_every_size(arrays, form, major_b):
    sizes = (3, 0, 130, 1, 64, 0)
    run(GroupedBf16Case(sizes, 200, 300, form, gap=3, pad=1, major_b=major_b), arrays)
    run(GroupedBf16Case(sizes, 136, 70, form, "f32", "exact", major_b=major_b), arrays)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes", [(128, 256), (100, 0, 28, 1, 300, 7), (0, 0), (5, 6, 7)], ids=str)
def test_grouped_wgrad(arrays, accumulate, sizes):
    for gap in (0, 37):
        k = sum(sizes) + 2 * gap + 16
        run(WgradBf16Case(70, 130, k, sizes=sizes, gap=gap, accumulate=accumulate, values="exact"), arrays)
        run(WgradBf16Case(5, 200, k, sizes=sizes, gap=gap, accumulate=accumulate, pad=1), arrays)


def test_random_groups(arrays, seed):
    rng = random.Random(seed)
    for _ in range(10):
        sizes = tuple(rng.choice((0, 1, 2, rng.randrange(150))) for _ in range(rng.randint(1, 8)))
        n, k, gap = rng.randint(1, 300), rng.randint(1, 300), rng.choice((0, 5))
        common = {"gap": gap, "pad": rng.randint(0, 2), "seed": seed, "values": rng.choice(("normal", "exact"))}
        out, major = rng.choice(("bf16", "f32")), rng.choice(MAJORS)
        run(GroupedBf16Case(sizes, n, k, rng.choice(FORMS), out, major_b=major, **common), arrays)
        tokens = sum(sizes) + 2 * gap + rng.randint(1, 20)
        run(WgradBf16Case(k, n, tokens, sizes=sizes, accumulate=rng.random() < 0.5, **common), arrays)


# --- what they return, and what they refuse ---------------------------------------------------------------------------


def bf16(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)


def test_new_outputs():
    a, b = bf16(7, 64), bf16(130, 64)
    d = phalanx.gemm_bf16(a, b)
    assert d.dtype == ml_dtypes.bfloat16 and d.shape == (7, 130) and d.strides == (2 * 136, 2)
    assert phalanx.gemm_bf16(a, b, c=np.ones((7, 132), np.float32)[:, :130]).dtype == np.float32
    offsets = np.array([0, 3, 7], np.int32)
    assert phalanx.grouped_gemm_bf16(a, bf16(2, 130, 64), offsets).shape == (7, 130)
    gradient = phalanx.grouped_wgrad_bf16(a, a, offsets)
    assert gradient.shape == (2, 64, 64) and gradient.dtype == np.float32


def test_bad_arguments():
    a, b = bf16(7, 64), bf16(128, 64)
    with pytest.raises(TypeError, match=r"gemm_bf16: b is f32.*expected dtype bf16"):
        phalanx.gemm_bf16(a, b.astype(np.float32))
    with pytest.raises(ValueError, match=r"b is.*\[128, 56\].*expected shape \[128, 64\]"):
        phalanx.gemm_bf16(a, b[:, :56])
    with pytest.raises(ValueError, match=r"a is.*row stride is 66 elements|a is.*row stride is 132 bytes"):
        phalanx.gemm_bf16(bf16(7, 66)[:, :64], b)
    with pytest.raises(ValueError, match=r"b, transposed, is.*row stride is 260 bytes"):
        phalanx.gemm_bf16(a, bf16(64, 130)[:, :128].T)
    with pytest.raises(ValueError, match=r"a is.*column stride is 2"):
        phalanx.gemm_bf16(bf16(7, 128)[:, ::2], b)
    with pytest.raises(ValueError, match=r"d is.*overlaps that of a"):
        phalanx.gemm_bf16(a, b[:64], out=a)
    with pytest.raises(ValueError, match="accumulate"):
        phalanx.grouped_wgrad_bf16(a, a, np.array([0, 7], np.int32), accumulate=True)
    stacked, offsets = bf16(2, 128, 64), np.array([0, 8, 7], np.int32)
    with pytest.raises(ValueError, match=r"grouped_gemm_bf16: offsets\[1\] is 8; expected at least 0, at most 7"):
        phalanx.grouped_gemm_bf16(a, stacked, offsets)
    with pytest.raises(ValueError, match=r"offsets.*expected shape \[3\], that is \[G \+ 1\]"):
        phalanx.grouped_gemm_bf16(a, stacked, offsets[:2])
    with pytest.raises(ValueError, match=r"a is.*column stride"):  # groups begin at any row
        phalanx.grouped_gemm_bf16(bf16(64, 8).T, stacked, np.array([0, 3, 8], np.int32))
    with pytest.raises(ValueError, match=r"b is.*\[8, 64\].*expected shape \[7, 64\]"):
        phalanx.grouped_wgrad_bf16(a, bf16(8, 64), offsets)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def test_gradients():
    torch = pytest.importorskip("torch")
    rng = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=rng).bfloat16().requires_grad_()  # noqa: E731
    a, b, c = make(33, 72), make(40, 72), make(33, 40)
    weight = torch.randn(33, 40, generator=rng)
    (phalanx.gemm_bf16(a, b, c=c).float() * weight).sum().backward()
    x, w, y = (t.detach().double().requires_grad_() for t in (a, b, c))
    ((x @ w.t() + y) * weight).sum().backward()
    for ours, exact in ((a, x), (b, w), (c, y)):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-2, atol=5e-2)

    moved = torch.cat([torch.zeros(3).bfloat16(), phalanx.gemm_bf16(a, b, c=c).reshape(-1)])[3:].reshape(33, 40)
    for ours, expected in zip(torch.autograd.grad((moved.float() * weight).sum(), (a, b, c)), (a, b, c), strict=True):
        assert torch.equal(ours, expected.grad)
    none = torch.autograd.grad(phalanx.gemm_bf16(a[:0], b).sum(), (a, b))
    assert not none[0].any() and not none[1].any() and none[1].shape == b.shape
    with pytest.raises(ValueError, match="out: given to a call that is differentiated"):
        phalanx.gemm_bf16(a, b, out=torch.empty(33, 40).bfloat16())

    b.grad = None
    phalanx.gemm_bf16(a.detach(), b).float().sum().backward()
    torch.testing.assert_close(b.grad.float(), a.detach().float().sum(0).expand(40, -1), rtol=2e-2, atol=5e-2)

    experts, offsets = make(3, 40, 72), torch.tensor([1, 10, 10, 30], dtype=torch.int32)
    a.grad = None
    d = phalanx.grouped_gemm_bf16(a, experts, offsets)
    (d[1:30].float() * weight[1:30]).sum().backward()
    assert not a.grad[0].any() and not a.grad[30:].any() and not experts.grad[1].any()
    torch.testing.assert_close(
        a.grad[10:30].float(), weight[10:30].bfloat16().float() @ experts[2].float(), rtol=2e-2, atol=5e-2
    )
    wanted = weight[1:10].bfloat16().float().t() @ a[1:10].float()
    torch.testing.assert_close(experts.grad[0].float(), wanted, rtol=2e-2, atol=5e-2)


def test_torch_compile_and_fakes():
    torch = pytest.importorskip("torch")
    a, b = torch.randn(33, 72).bfloat16(), torch.randn(40, 72).bfloat16()
    stacked, offsets = torch.randn(2, 40, 72).bfloat16(), torch.tensor([0, 13, 33], dtype=torch.int32)

    def step(a, b, out):
        phalanx.grouped_wgrad_bf16(a, a, offsets, out=out, accumulate=True)
        d = phalanx.gemm_bf16(a, b, out_dtype=torch.float32) + phalanx.grouped_gemm_bf16(a, stacked, offsets)
        return d * 2, out + 1

    outs = [torch.ones(2, 72, 72) for _ in range(2)]
    expected = step(a, b, outs[0])
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(a, b, outs[1])
    for x, y in zip((*actual, outs[1]), (*expected, outs[0]), strict=True):
        assert torch.equal(x, y)

    tests, ops = ("test_schema", "test_faketensor", "test_autograd_registration"), torch.ops.phalanx
    torch.library.opcheck(ops.gemm_bf16.default, (a, b), test_utils=tests)
    torch.library.opcheck(ops.gemm_bf16.default, (a, b, None, torch.float32), test_utils=tests)
    torch.library.opcheck(ops.grouped_gemm_bf16.default, (a, stacked, offsets), test_utils=tests)
    torch.library.opcheck(ops.grouped_wgrad_bf16.default, (a, a, offsets), test_utils=tests)
    masked = torch.randn(2, 9, 72).bfloat16(), stacked, torch.tensor([3, 9], dtype=torch.int32)
    torch.library.opcheck(ops.grouped_gemm_bf16_masked.default, masked, test_utils=("test_faketensor",))


def test_jax():
    jax = pytest.importorskip("jax")
    inputs = GemmBf16Case(9, 128, 64, "f32").make(NumPyArrays())
    a, b = (jax.numpy.asarray(np.array(x.array)) for x in (inputs.a, inputs.b))
    d = phalanx.gemm_bf16(a, b, out_dtype=np.dtype(np.float32))
    np.testing.assert_allclose(np.asarray(d), np.asarray(a, np.float32) @ np.asarray(b, np.float32).T, atol=1e-2)


def test_a_second_derivative_of_groups_is_refused():
    torch = pytest.importorskip("torch")
    a = torch.randn(24, 64).bfloat16().requires_grad_()
    b = torch.randn(3, 32, 64).bfloat16().requires_grad_()
    d = phalanx.grouped_gemm_bf16(a, b, torch.tensor([0, 10, 10, 24], dtype=torch.int32))
    (grad,) = torch.autograd.grad(d.float().pow(2).sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_wgrad_bf16 has no gradient"):
        grad.float().pow(2).sum().backward()
