"""quantize and dequantize on the CPU: the bytes that docs/numerics.md defines."""

import random

import ml_dtypes
import numpy as np
import phalanx
import pytest
from cases import DequantizeCase, QuantizeCase, TransposedCase

SIZES = [(0, 128), (1, 1), (3, 128), (130, 300), (257, 513), (128, 1024)]


def run(case, arrays):
    inputs = case.make(arrays)
    case.run(inputs)
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


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("values", ["normal", "edges", "bits"])
def test_transposed_and_both(arrays, size, dtype, values):
    for pow2_scales in (False, True):
        case = TransposedCase(*size, dtype, pow2_scales, values=values)
        inputs = case.make(arrays)
        case.check(inputs, case.run(inputs))


def test_random_sizes(arrays, seed):
    rng = random.Random(seed)
    for _ in range(60):
        size, pad = (rng.randint(1, 400), rng.randint(1, 700)), rng.randint(0, 9)
        dtype, block_rows, layout = rng.choice(("bf16", "f16", "f32")), rng.choice((1, 128)), rng.choice(("mn", "k"))
        values, pow2 = rng.choice(("normal", "edges", "bits")), rng.random() < 0.5
        run(QuantizeCase(*size, dtype, block_rows, pow2, layout, pad, values, seed), arrays)
        run(DequantizeCase(*size, dtype, block_rows, layout, pad, seed), arrays)
        case = TransposedCase(*size, dtype, pow2, layout, pad, values, seed)
        inputs = case.make(arrays)
        case.check(inputs, case.run(inputs))


def quantize_row(*values):
    q = phalanx.quantize(np.array([values], np.float32))
    return [int(byte) for byte in q.data.view(np.uint8)[0]], float(q.scales[0, 0])


def test_edges_by_hand():
    tiny = 2.0**-126
    assert quantize_row(0.0, -0.0) == ([0x00, 0x80], tiny)
    assert quantize_row(448.0, -448.0, 1.0) == ([0x7E, 0xFE, 0x38], 1.0)
    assert quantize_row(896.0, 2.0) == ([0x7E, 0x38], 2.0)
    assert quantize_row(np.inf, -np.inf, np.nan, -np.nan, 448.0) == ([0x7E, 0xFE, 0x7F, 0x7F, 0x7E], 1.0)
    assert quantize_row(np.nan, np.inf) == ([0x7F, 0x7E], tiny)
    assert quantize_row(2.0**-149, -(2.0**-127)) == ([0x00, 0xB0], tiny)  # FP32 subnormals
    assert quantize_row(448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10)[0] == [0x7E, 0x01, 0x00, 0x02]  # ties to even
    assert quantize_row(448.0, 17.0, 19.0, -17.0)[0] == [0x7E, 0x58, 0x5A, 0xD8]


def test_power_of_two_scales_are_not_below_the_plain_ones():
    x = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    plain, pow2 = phalanx.quantize(x).scales, phalanx.quantize(x, pow2_scales=True).scales
    mantissa, _ = np.frexp(pow2)
    assert (mantissa == 0.5).all() and (pow2 >= plain).all() and (pow2 < 2 * plain).all()


def test_layout_of_new_arrays():
    q = phalanx.quantize(np.ones((33, 300), np.float32))
    assert q.data.dtype == ml_dtypes.float8_e4m3fn and q.data.shape == (33, 300) and q.data.strides == (304, 1)
    assert q.scales.shape == (33, 3) and q.scales.strides == (4, 4 * 36)  # MN-major, columns padded to 16 bytes
    q = phalanx.quantize(np.ones((300, 300), np.float32), block=(128, 128))
    assert q.scales.shape == (3, 3) and q.scales.strides == (12, 4)


def test_out_is_returned():
    x = np.random.default_rng(0).standard_normal((8, 256), np.float32)
    expected = phalanx.quantize(x)
    out = phalanx.Quantized(np.zeros((8, 256), ml_dtypes.float8_e4m3fn), np.zeros((8, 2), np.float32))
    q = phalanx.quantize(x, out=out)
    assert isinstance(q, phalanx.Quantized) and q.data is out.data and q.scales is out.scales
    np.testing.assert_array_equal(q.data.view(np.uint8), expected.data.view(np.uint8))
    np.testing.assert_array_equal(q.scales, expected.scales)
    y = np.empty((8, 256), np.float16)
    assert phalanx.dequantize(q, out=y) is y


def test_round_trip_error():
    x = np.random.default_rng(1).standard_normal((40, 500), np.float32)
    q = phalanx.quantize(x)
    y = phalanx.dequantize(q)
    assert y.dtype == np.float32
    scales = q.scales.repeat(128, 1)[:, :500]
    assert (np.abs(y - x) <= np.maximum(np.abs(x) * 2.0**-4, scales * 2.0**-10) * (1 + 2.0**-18)).all()
