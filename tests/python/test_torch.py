"""PyTorch on the CPU: tensors in, tensors out; torch.compile and torch.export see through."""

import subprocess
import sys

import phalanx
import pytest

torch = pytest.importorskip("torch")


@pytest.fixture
def x():
    return torch.randn(33, 300, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def b():
    w = torch.randn(257, 300, generator=torch.Generator().manual_seed(1))
    return phalanx.quantize(w, block=(128, 128))


def same_bits(x, y):
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def test_tensors_of_the_right_kind(x, b):
    a = phalanx.quantize(x)
    assert a.data.dtype == torch.float8_e4m3fn and a.data.stride() == (304, 1)
    assert a.scales.dtype == torch.float32 and a.scales.stride() == (1, 36)
    d = phalanx.gemm_fp8(a, b)
    assert d.dtype == torch.bfloat16 and d.shape == (33, 257) and d.stride() == (264, 1)
    assert phalanx.gemm_fp8(a, b, out_dtype=torch.float32).dtype == torch.float32
    assert phalanx.dequantize(a).dtype == torch.float32
    assert phalanx.dequantize(a, dtype=torch.float16).dtype == torch.float16


def test_out_and_c(x, b):
    a = phalanx.quantize(x)
    plain = phalanx.gemm_fp8(a, b, out_dtype=torch.float32)
    d = torch.ones(33, 260)[:, :257]
    assert phalanx.gemm_fp8(a, b, c=d, out=d) is d
    torch.testing.assert_close(d, plain + 1)


def test_sliced_operands(x, b):
    """Rows of a wider, taller tensor: row strides and offsets are honoured."""
    a = phalanx.quantize(x)
    wide = torch.zeros(50, 1024).to(torch.float8_e4m3fn)
    wide[10:43, 512:812] = a.data
    d = phalanx.gemm_fp8((wide[10:43, 512:812], a.scales.contiguous()), b)
    assert same_bits(d, phalanx.gemm_fp8(a, b))


def test_parameters_and_gradients(x, b):
    """Parameters serve; results carry no gradient."""
    a = phalanx.quantize(x)
    weight = torch.nn.Parameter(b.data, requires_grad=False)
    assert same_bits(phalanx.gemm_fp8(a, (weight, b.scales)), phalanx.gemm_fp8(a, b))
    q = phalanx.quantize(x.float().requires_grad_())
    assert not q.data.requires_grad and not q.scales.requires_grad


def test_subclasses_go_through_the_dispatcher(x, b):
    calls = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    a = phalanx.quantize(x)
    d = phalanx.gemm_fp8((a.data.as_subclass(Watched), a.scales), b)
    assert any("gemm_fp8" in name for name in calls)
    assert same_bits(d.as_subclass(torch.Tensor), phalanx.gemm_fp8(a, b))
    watched = a.data.as_subclass(Watched)
    with pytest.raises(ValueError, match=r"out_dtype: torch\.bfloat16; expected that of out, torch\.float32"):
        phalanx.gemm_fp8((watched, a.scales), b, out=torch.empty(33, 260)[:, :257], out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^dtype: torch\.bfloat16; expected that of out, torch\.float32"):
        phalanx.dequantize((watched, a.scales), out=torch.empty(33, 300), dtype=torch.bfloat16)


# --- tracing ----------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    def __init__(self, b):
        super().__init__()
        self.register_buffer("data", b.data)
        self.register_buffer("scales", b.scales)

    def forward(self, x):
        return phalanx.gemm_fp8(phalanx.quantize(x), (self.data, self.scales)) * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_a_break(x, b, backend):
    module = Linear(b)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert same_bits(compiled(x), module(x))
    assert same_bits(compiled(x[:7]), module(x[:7]))  # another M


def test_compile_out_and_dequantize(x, b):
    def step(x, out):
        a = phalanx.quantize(x, pow2_scales=True)
        phalanx.gemm_fp8(a, b, c=out, out=out)
        return phalanx.dequantize(a, dtype=torch.bfloat16), out * 2

    outs = [torch.ones(33, 264, dtype=torch.bfloat16)[:, :257] for _ in range(2)]
    expected = step(x, outs[0])
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(x, outs[1])
    assert all(same_bits(*pair) for pair in zip((*actual, outs[1]), (*expected, outs[0]), strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export(x, b, strict):
    module = Linear(b)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: rows}}, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"phalanx.quantize.default", "phalanx.gemm_fp8.default"} <= called
    assert same_bits(program.module()(x), module(x))
    assert same_bits(program.module()(x[:5]), module(x[:5]))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_new_weights_for_a_constant(x, strict):
    """What is traced need not come first."""

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = phalanx.quantize(x)  # not a buffer

        def forward(self, w):
            return phalanx.gemm_fp8(self.a, phalanx.quantize(w, (128, 128)))

    w, module = torch.randn(264, x.shape[1]), Product()
    assert same_bits(torch.export.export(module, (w,), strict=strict).module()(w), module(w))


def test_fake_kernels_tell_the_truth(x, b):
    """Shapes, strides and dtypes of fake results are those of real ones."""
    a = phalanx.quantize(x)
    tests = ("test_faketensor", "test_autograd_registration")
    ops = torch.ops.phalanx
    torch.library.opcheck(ops.gemm_fp8.default, (*a, *b), test_utils=tests)
    torch.library.opcheck(ops.gemm_fp8.default, (*a, *b, None, torch.float32, 0, True), test_utils=tests)
    torch.library.opcheck(ops.quantize.default, (x, False, True), test_utils=tests)
    torch.library.opcheck(ops.quantize.default, (x, True, False), test_utils=tests)
    torch.library.opcheck(ops.dequantize.default, (*a, torch.float16), test_utils=tests)


def test_meta_tensors(x, b):
    a = phalanx.quantize(x.to("meta"))
    d = phalanx.gemm_fp8(a, phalanx.Quantized(*(part.to("meta") for part in b)))
    assert d.is_meta and d.shape == (33, 257) and d.stride() == phalanx.gemm_fp8(phalanx.quantize(x), b).stride()
    assert phalanx.dequantize(a).is_meta


def test_dtypes_that_are_none(x, b):
    a = phalanx.quantize(x)
    d = phalanx.gemm_fp8(a, b, out_dtype=torch.float32)
    with pytest.raises(TypeError, match="out_dtype: 'bf16'; expected a torch.dtype"):
        phalanx.gemm_fp8(a, b, out_dtype="bf16")
    with pytest.raises(TypeError, match="c: ndarray; expected a torch.Tensor"):
        phalanx.gemm_fp8(a, b, c=d.numpy())


@pytest.mark.parametrize("imports", ["import torch, phalanx", "import phalanx, torch, phalanx.torch"])
def test_operators_are_there_after_import(imports):
    code = f"{imports}; print(torch.ops.phalanx.gemm_fp8.default._schema)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith("phalanx::gemm_fp8(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor? c=None")


@pytest.mark.parametrize("operator", [False, True])
def test_torch_hears_of_what_out_was_written(x, b, operator):
    a, w = torch.randn(16, 64).bfloat16(), torch.randn(24, 64).bfloat16()
    out, factor = torch.ones(16, 24).bfloat16(), torch.ones(16, 24).bfloat16().requires_grad_()
    y = out * factor
    if operator:
        torch.ops.phalanx.gemm_bf16_out(a, w, None, out)
    else:
        phalanx.gemm_bf16(a, w, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # the gradient of `factor` is what `out` was

    q = phalanx.quantize(x)
    rows, weights = phalanx.quantize(x[:, :128].contiguous()), phalanx.quantize(torch.randn(256, 128), (128, 128))
    stack, offsets = [field[None] for field in weights], torch.tensor([0, 33], dtype=torch.int32)
    for tensor, write in (
        (
            torch.empty(33, 256).bfloat16(),
            lambda g: phalanx.grouped_gemm_fp8_swiglu(rows, stack, offsets, gates_and_ups=g),
        ),
        (torch.empty(33, 260)[:, :257], lambda d: phalanx.gemm_fp8(q, b, out=d)),
        (torch.empty(33, 300), lambda d: phalanx.dequantize(q, out=d)),
        (q.scales, lambda _: phalanx.quantize(x, out=q)),
    ):
        before = tensor._version
        write(tensor)
        assert tensor._version > before


def test_out_that_requires_a_gradient_is_refused(x, b):
    out = torch.zeros(33, 260, requires_grad=True)
    with pytest.raises(ValueError, match="^out: it requires a gradient"):
        phalanx.gemm_fp8(phalanx.quantize(x), b, out=out[:, :257])
    assert (out == 0).all()
    with torch.no_grad():
        phalanx.gemm_fp8(phalanx.quantize(x), b, out=out[:, :257])
    assert (out != 0).any()


def test_tangents_are_not_lost():
    """Forward-mode derivatives, which no operator has."""
    a, b = torch.randn(16, 64).bfloat16(), torch.randn(24, 64).bfloat16()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            phalanx.gemm_bf16(dual, b)
        assert torch.equal(phalanx.gemm_bf16(a, b), phalanx.gemm_bf16(a, b))
