"""gemm_fp8 on the CPU, in NumPy and in PyTorch: every case within its bound."""

import threading

import ml_dtypes
import numpy as np
import phalanx
import pytest
from cases import GemmFp8Case, random_shapes, shapes


def run(case, arrays):
    inputs = case.make(arrays)
    assert case.run(inputs) is inputs.out.array
    case.check(inputs)
    return inputs


@pytest.mark.parametrize("shape", shapes("small", "odd", "edge"), ids=str)
@pytest.mark.parametrize("out", ["bf16", "f32"])
def test_shapes(arrays, shape, out):
    run(GemmFp8Case(*shape, out=out), arrays)


@pytest.mark.parametrize("c", ["apart", "alias"])
@pytest.mark.parametrize("out", ["bf16", "f32"])
def test_c(arrays, c, out):
    run(GemmFp8Case(130, 264, 300, out=out, c=c), arrays)


@pytest.mark.parametrize("values", ["exact", "bits", "scales"])
@pytest.mark.parametrize("sfa_layout", ["mn", "k"])
@pytest.mark.parametrize("pad", [0, 3])
def test_values_and_layouts(arrays, values, sfa_layout, pad):
    run(GemmFp8Case(67, 200, 520, "f32", sfa_layout=sfa_layout, pad=pad, values=values), arrays)


def test_batch_invariant(arrays):
    """Within the bound too; and a row alone has the bits that it has among others."""
    case = GemmFp8Case(40, 136, 300, "f32")
    inputs = case.make(arrays)
    whole = arrays.to_numpy(case.run(inputs, batch_invariant=True)).copy()
    case.check(inputs)
    b = (inputs.b.array, inputs.sfb.array)
    for row in (0, 17, 39):
        a = (inputs.a.array[row : row + 1], inputs.sfa.array[row : row + 1])
        alone = phalanx.gemm_fp8(a, b, out_dtype=arrays.dtype("f32"), batch_invariant=True)
        np.testing.assert_array_equal(arrays.to_numpy(alone)[0], whole[row])


def test_long_k_is_exact(arrays):
    run(GemmFp8Case(3, 130, 20000, "f32", values="exact"), arrays)


def test_random_shapes(arrays, seed):
    for i, shape in enumerate(random_shapes(40, seed, 400)):
        case = GemmFp8Case(
            *shape,
            out=("bf16", "f32")[i % 2],
            c=("none", "apart", "alias")[i % 3],
            sfa_layout=("mn", "k")[i // 2 % 2],
            pad=i % 4,
            values=("normal", "bits", "exact")[i % 3],
            seed=seed,
        )
        run(case, arrays)


def test_nan_and_infinity_reach_what_they_take_part_in(arrays):
    case = GemmFp8Case(5, 130, 260, "f32")
    inputs = case.make(arrays)
    inputs.a.array.view(_bytes(arrays))[1, 200] = 0x7F
    inputs.b.array.view(_bytes(arrays))[129, 0] = 0xFF
    inputs.sfa.array[3, 2] = float("nan")
    case.run(inputs)
    case.check(inputs)
    nan = np.isnan(arrays.to_numpy(inputs.out.array))
    assert nan[1].all() and nan[3].all() and nan[:, 129].all() and nan.sum() == 130 + 130 + 3


def _bytes(arrays):
    return arrays.xp.uint8


def test_same_bits_each_time_and_from_many_threads(arrays):
    case = GemmFp8Case(190, 300, 700)
    inputs = case.make(arrays)
    case.run(inputs)
    expected = arrays.to_numpy(inputs.out.array).view(np.uint16).copy()
    a, b = (inputs.a.array, inputs.sfa.array), (inputs.b.array, inputs.sfb.array)
    results = {}

    def work(i):
        for j in range(5):
            results[i, j] = arrays.to_numpy(phalanx.gemm_fp8(a, b)).view(np.uint16)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    for result in results.values():
        np.testing.assert_array_equal(result, expected)


# --- what it returns --------------------------------------------------------------------------------------------------


def quantized(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32)
    return phalanx.quantize(x), phalanx.quantize(w, (128, 128))


def test_default_output_is_bf16_with_padded_rows():
    d = phalanx.gemm_fp8(*quantized(5, 130, 128))
    assert isinstance(d, np.ndarray) and d.dtype == ml_dtypes.bfloat16
    assert d.shape == (5, 130) and d.strides == (2 * 136, 2)


def test_output_dtype_follows_c_and_out_dtype():
    a, b = quantized(5, 16, 128)
    c = np.ones((5, 16), np.float32)
    assert phalanx.gemm_fp8(a, b, c=c).dtype == np.float32
    d = phalanx.gemm_fp8(a, b, out_dtype=np.float32)
    np.testing.assert_allclose(phalanx.gemm_fp8(a, b, c) - d, c, atol=1e-4)


def test_plain_pairs_serve():
    a, b = quantized(5, 16, 128)
    np.testing.assert_array_equal(phalanx.gemm_fp8((a.data, a.scales), [b.data, b.scales]), phalanx.gemm_fp8(a, b))


def test_read_only_inputs_serve():
    a, b = quantized(5, 16, 128)
    expected = phalanx.gemm_fp8(a, b)
    for array in (*a, *b):
        array.flags.writeable = False
    np.testing.assert_array_equal(phalanx.gemm_fp8(a, b), expected)


def test_close_to_the_product_of_what_was_quantized():
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((64, 512), np.float32), rng.standard_normal((96, 512), np.float32)
    d = phalanx.gemm_fp8(phalanx.quantize(x), phalanx.quantize(w, (128, 128)), out_dtype=np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.linalg.norm(d - exact) < 0.05 * np.linalg.norm(exact)
