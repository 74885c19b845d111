"""CuPy and JAX on the GPU: the bits that PyTorch gets."""

import numpy as np
import phalanx
import pytest

torch = pytest.importorskip("torch")


@pytest.fixture
def operands(arrays):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 1024), np.float32), rng.standard_normal((264, 1024), np.float32)
    a = phalanx.quantize(torch.from_numpy(x).cuda())
    b = phalanx.quantize(torch.from_numpy(w).cuda(), (128, 128))
    d = phalanx.gemm_fp8(a, b, out_dtype=torch.float32)
    return x, w, a, b, d.cpu().numpy()


def test_cupy(operands):
    cupy = pytest.importorskip("cupy")
    x, w, _, _, expected = operands
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        a = phalanx.quantize(cupy.asarray(x))
        b = phalanx.quantize(cupy.asarray(w), (128, 128))
        d = phalanx.gemm_fp8(a, b, out_dtype=cupy.float32)
        out = cupy.ones((200, 264), cupy.float32)
        phalanx.gemm_fp8(a, b, c=out, out=out)
        y = phalanx.dequantize(a)
    stream.synchronize()
    assert a.data.dtype == cupy.uint8 and isinstance(d, cupy.ndarray)
    np.testing.assert_array_equal(d.get(), expected)
    np.testing.assert_allclose(out.get(), expected + 1, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(y.get(), x, atol=0.3)


def test_cupy_bf16(operands):
    cupy = pytest.importorskip("cupy", minversion="14")
    x, w, a, b, _ = operands
    d = phalanx.gemm_fp8(phalanx.quantize(cupy.asarray(x)), phalanx.quantize(cupy.asarray(w), (128, 128)))
    assert d.dtype.name == "bfloat16"
    expected = phalanx.gemm_fp8(a, b)
    np.testing.assert_array_equal(d.view(cupy.uint16).get(), expected.view(torch.int16).cpu().numpy().view(np.uint16))


def test_cupy_works_on_its_stream(operands):
    """Its inputs arrive late, on a stream that no other waits for."""
    cupy = pytest.importorskip("cupy")
    x, w, _, _, expected = operands
    b = phalanx.quantize(cupy.asarray(w), (128, 128))
    late, source = cupy.zeros_like(cupy.asarray(x)), cupy.asarray(x)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        torch.cuda.ExternalStream(stream.ptr).wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(50_000_000)
        late[...] = source
        d = phalanx.gemm_fp8(phalanx.quantize(late), b, out_dtype=cupy.float32)
    stream.synchronize()
    np.testing.assert_array_equal(d.get(), expected)


def test_jax(operands):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    x, w, _, _, expected = operands
    y = jax.numpy.asarray(x)
    for _ in range(20):  # still being computed when we are called
        y = -y
    a = phalanx.quantize(y)
    b = phalanx.quantize(jax.numpy.asarray(w), (128, 128))
    d = phalanx.gemm_fp8(a, b, out_dtype=jax.numpy.float32)
    assert isinstance(d, jax.Array) and d.devices() == y.devices()
    np.testing.assert_array_equal(np.asarray(d), expected)
    assert phalanx.gemm_fp8(a, b).dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(np.asarray(phalanx.dequantize(a)), x, atol=0.3)


def test_jax_inside_jit(operands):
    jax = pytest.importorskip("jax")
    pytest.importorskip("jax_tvm_ffi")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    x, w, _, _, expected = operands

    @jax.jit
    def product(y, b):
        for _ in range(20):  # ours comes behind XLA's kernels, and before them
            y = jax.numpy.sin(y) + y - jax.numpy.sin(y)
        a = phalanx.quantize(-y)
        across = phalanx.quantize_both(y)
        return -phalanx.gemm_fp8(a, b, out_dtype=jax.numpy.float32), a, across, phalanx.dequantize(a), y

    b = phalanx.quantize(jax.numpy.asarray(w), (128, 128))
    for _ in range(10):
        d, a, across, wide, y = product(jax.numpy.asarray(x), b)
    np.testing.assert_array_equal(np.asarray(d), -np.asarray(phalanx.gemm_fp8(a, b, out_dtype=jax.numpy.float32)))
    np.testing.assert_allclose(np.asarray(d), expected, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_array_equal(np.asarray(wide), np.asarray(phalanx.dequantize(a)))
    eager = phalanx.quantize(-y), phalanx.quantize_both(y)
    for one, other in zip(jax.tree.leaves((a, across)), jax.tree.leaves(eager), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
