"""Bad input is an exception that names the argument, its value and what was expected; nothing is written."""

import ml_dtypes
import numpy as np
import phalanx
import pytest

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
M, N, K = 32, 256, 384


def aligned(rows, cols, dtype, stride=None, offset=0):
    """A matrix with this row stride (elements), `offset` bytes past 16-byte alignment."""
    itemsize = np.dtype(dtype).itemsize
    stride = stride or cols
    memory = np.zeros(rows * stride * itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    return np.ndarray((rows, cols), dtype, memory[start:], strides=(stride * itemsize, itemsize))


@pytest.fixture
def good():
    """Right arguments, of which a test spoils one."""
    return {
        "a": [aligned(M, K, E4M3), aligned(M, 3, np.float32)],
        "b": [aligned(N, K, E4M3), aligned(2, 3, np.float32)],
        "c": None,
        "out": aligned(M, N, BF16),
    }


def fails(arguments, exception, *parts):
    """gemm_fp8 raises `exception`, whose message has all `parts`, and leaves the output alone."""
    out = arguments["out"]
    if isinstance(out, np.ndarray) and out.flags.writeable:
        out[...] = 7
    with pytest.raises(exception) as info:
        phalanx.gemm_fp8(**arguments)
    for part in parts:
        assert str(part) in str(info.value), str(info.value)
    if isinstance(out, np.ndarray) and out.flags.writeable:
        assert (out == np.array(7, out.dtype)).all()


def test_the_good_arguments_are_good(good):
    assert phalanx.gemm_fp8(**good) is good["out"]


# --- shape ------------------------------------------------------------------------------------------------------------


def test_k_differs(good):
    good["b"][0] = aligned(N, 256, E4M3)
    fails(good, ValueError, "b.data", "[256, 256]", "K")


@pytest.mark.parametrize("name, shape", [("a", (M, 2)), ("a", (3, M)), ("b", (N, 3)), ("b", (3, 3))])
def test_scales_shape(good, name, shape):
    good[name][1] = aligned(*shape, np.float32)
    fails(good, ValueError, f"{name}.scales", list(shape), "expected")


def test_out_shape(good):
    good["out"] = aligned(M, N - 8, BF16)
    fails(good, ValueError, "d is", [M, N - 8], [M, N])


def test_c_shape(good):
    good["c"] = aligned(M - 1, N, BF16)
    fails(good, ValueError, "c is", [M - 1, N], [M, N])


def test_not_a_matrix(good):
    good["a"][0] = good["a"][0].reshape(2, M // 2, K)
    fails(good, ValueError, "a.data", "3 dimensions", "expected")
    fails({**good, "out": None}, ValueError, "a.data", "matrix")


def test_too_many_dimensions(good):
    good["a"][0] = good["a"][0].reshape(1, 1, 1, M, K)
    fails(good, ValueError, "a.data", "5")


def test_empty_k(good):
    good["a"] = [np.zeros((M, 0), E4M3), np.zeros((M, 0), np.float32)]
    good["b"] = [np.zeros((N, 0), E4M3), np.zeros((2, 0), np.float32)]
    fails(good, ValueError, "K", "at least 1")


def test_empty_n(good):
    good["b"] = [np.zeros((0, K), E4M3), np.zeros((0, 3), np.float32)]
    good["out"] = np.zeros((M, 0), BF16)
    fails(good, ValueError, "N", "at least 1")


def test_too_large(good):
    huge = 2**31
    one = aligned(1, 16, E4M3)
    good["a"] = [np.lib.stride_tricks.as_strided(one, (huge, K), (0, 1)), good["a"][1]]
    fails(good, ValueError, "a.data", huge, huge - 2**16)


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ml_dtypes.float8_e5m2, BF16, np.float32])
def test_data_dtype(good, name, dtype):
    good[name][0] = aligned(*good[name][0].shape, dtype)
    fails(good, TypeError, f"{name}.data", "expected")


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("dtype", [np.float64, BF16, np.float16])
def test_scales_dtype(good, name, dtype):
    good[name][1] = good[name][1].astype(dtype)
    fails(good, TypeError, f"{name}.scales", "expected")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, E4M3])
def test_out_dtype(good, dtype):
    good["out"] = aligned(M, N, dtype)
    fails(good, TypeError, "d", "expected")


def test_c_dtype_differs(good):
    good["c"] = aligned(M, N, np.float32)
    fails(good, TypeError, "c is", "expected")


def test_out_dtype_contradicts_out(good):
    fails({**good, "out_dtype": np.float32}, ValueError, "out_dtype", "float32", "bfloat16")


def test_foreign_byte_order(good):
    good["a"][1] = good["a"][1].astype(">f4")
    fails(good, TypeError, ">f4")


# --- stride, alignment, overlap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
def test_data_row_stride(good, name):
    rows, cols = good[name][0].shape
    good[name][0] = aligned(rows, cols, E4M3, cols + 8)
    fails(good, ValueError, f"{name}.data", "row stride", cols + 8, 16)


@pytest.mark.parametrize("name", ["out", "c"])
def test_output_row_stride(good, name):
    good[name] = aligned(M, N, BF16, N + 4)
    fails(good, ValueError, "row stride", 2 * (N + 4), 16)


@pytest.mark.parametrize("name", ["a", "b"])
def test_data_by_columns(good, name):
    rows, cols = good[name][0].shape
    good[name][0] = aligned(cols, rows, E4M3).T
    fails(good, ValueError, f"{name}.data", "column stride", rows, "expected 1")


@pytest.mark.parametrize("name", ["a", "b"])
def test_data_base(good, name):
    rows, cols = good[name][0].shape
    good[name][0] = aligned(rows, cols, E4M3, offset=8)
    fails(good, ValueError, f"{name}.data", hex(good[name][0].ctypes.data), 16)


def test_output_base(good):
    good["out"] = aligned(M, N, BF16, offset=2)
    fails(good, ValueError, "d is", hex(good["out"].ctypes.data), 16)


def test_scales_base(good):
    good["a"][1] = aligned(M, 3, np.float32, offset=2)
    fails(good, ValueError, "a.scales", "multiple of 4")


def test_output_rows_overlap(good):
    row = aligned(1, N, BF16)
    good["out"] = np.lib.stride_tricks.as_strided(row, (M, N), (0, 2))
    fails(good, ValueError, "d is", "row stride")


def test_output_overlaps_an_input(good):
    memory = aligned(M, 4 * N, np.uint8)
    good["a"][0] = memory[:, :K].view(E4M3)
    good["out"] = memory[:, 256 : 256 + 2 * N].view(BF16)
    with pytest.raises(ValueError, match=r"overlaps that of a\.data"):
        phalanx.gemm_fp8(**good)


def test_output_overlaps_c_in_part(good):
    memory = aligned(M + 1, N, BF16)
    good["c"], good["out"] = memory[:M], memory[1:]
    with pytest.raises(ValueError, match="overlap"):
        phalanx.gemm_fp8(**good)


def test_read_only_output(good):
    good["out"].flags.writeable = False
    fails(good, ValueError, "out", "read-only")


# --- what is no array, or none at all ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 3, "abc", [1], (1, 2, 3)])
def test_no_pair(good, value):
    fails({**good, "a": value}, TypeError, "a: expected", type(value).__name__)
    fails({**good, "b": value}, TypeError, "b: expected", type(value).__name__)


@pytest.mark.parametrize("name", ["a", "b"])
def test_null_scales(good, name):
    good[name][1] = None
    fails(good, TypeError, f"{name}.scales", "expected an array", "None")


def test_null_data(good):
    fails({**good, "a": (None, good["a"][1])}, TypeError, "a: expected an array", "NoneType")
    good["b"][0] = None
    fails(good, TypeError, "b.data", "expected an array", "None")


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("value", [3, "abc", [1.0]])
def test_a_new_result_is_shaped_by_arrays_only(library, value):
    x, w = np.ones((4, 256), np.float32), np.ones((128, 256), np.float32)
    if library == "torch":
        x, w = map(pytest.importorskip("torch").from_numpy, (x, w))
    a, b = phalanx.quantize(x), phalanx.quantize(w, (128, 128))
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"b\.data: expected an array, got {kind}"):
        phalanx.gemm_fp8(a, (value, b.scales))
    with pytest.raises(TypeError, match=f"c: expected an array, got {kind}"):
        phalanx.gemm_fp8(a, b, c=value)
    with pytest.raises(TypeError, match=f"out: expected an array, got {kind}"):
        phalanx.gemm_fp8(a, b, out=value, out_dtype=a.scales.dtype)
    with pytest.raises(TypeError, match=f"out: expected an array, got {kind}"):
        phalanx.dequantize(a, out=value, dtype=a.scales.dtype)
    with pytest.raises(TypeError, match=f"b: expected an array, got {kind}"):
        phalanx.gemm_bf16(phalanx.dequantize(a), value)
    with pytest.raises(TypeError, match=f"c: expected an array, got {kind}"):
        phalanx.gemm_bf16(x, w, c=value)
    with pytest.raises(TypeError, match=f"b: expected an array, got {kind}"):
        phalanx.grouped_gemm_fp8(a, (value, b.scales), None)
    with pytest.raises(TypeError, match=rf"b\.data: expected an array, got {kind}"):
        phalanx.wgrad_fp8(a, (value, a.scales))
    with pytest.raises(TypeError, match=f"offsets: expected an array, got {kind}"):
        phalanx.grouped_wgrad_bf16(x, x, value)


def test_lists_are_no_arrays(good):
    good["b"][1] = [[1.0] * 3] * 2
    fails(good, TypeError, "b.scales", "expected an array")


def test_num_sms(good):
    fails({**good, "num_sms": -1}, ValueError, "num_sms", -1, "expected")
    fails({**good, "num_sms": 2**40}, ValueError, "num_sms", 2**40, "out of range")


@pytest.mark.parametrize("name, kind", [("num_sms", "an integer"), ("batch_invariant", "True or False")])
@pytest.mark.parametrize("value", [None, "many", 1.5, [1]])
def test_options_of_the_wrong_kind(good, name, kind, value):
    fails({**good, name: value}, TypeError, f"{name}: expected {kind}")
    x = np.ones((4, 256), BF16)
    with pytest.raises(TypeError, match=f"{name}: expected {kind}"):
        phalanx.gemm_bf16(x, x, **{name: value})


@pytest.mark.parametrize("quantize", [phalanx.quantize, phalanx.quantize_transposed, phalanx.quantize_both])
def test_pow2_scales_of_the_wrong_kind(quantize):
    with pytest.raises(TypeError, match="pow2_scales: expected True or False"):
        quantize(np.ones((4, 256), np.float32), pow2_scales="no")


def test_rows_expected_beyond_int32():
    a = phalanx.quantize(np.ones((4, 256), np.float32))
    b = phalanx.quantize(np.ones((128, 256), np.float32), (128, 128))
    stack, offsets = (b.data[None], b.scales[None]), np.array([0, 4], np.int32)
    with pytest.raises(ValueError, match=f"expected_rows: {2**32 + 1} is out of range"):
        phalanx.grouped_gemm_fp8(a, stack, offsets, expected_rows=2**32 + 1)


# --- quantize and dequantize ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 64), (128, 1), (64, 128), 128, None])
def test_block(block):
    with pytest.raises(ValueError, match="block: .* expected"):
        phalanx.quantize(np.zeros((4, 128), np.float32), block=block)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, E4M3])
def test_quantize_dtype(dtype):
    with pytest.raises(TypeError, match="x.*expected"):
        phalanx.quantize(np.zeros((4, 128), dtype))


def test_what_no_view_can_be_made_of_is_named(good):
    for dtype in (np.complex64, object, "U3", "M8[s]", ">f4"):
        strange = np.zeros((4, 128), dtype)
        with pytest.raises(TypeError, match="^x: dtype .* is not supported; expected float8_e4m3fn"):
            phalanx.quantize(strange)
        fails({**good, "c": strange}, TypeError, "c: dtype", "is not supported")
    packed = np.zeros((4, 128), np.dtype([("x", np.float32), ("flag", np.uint8)]))["x"]
    with pytest.raises(ValueError, match=r"^x: strides \(640, 5\) \(bytes\); expected multiples of the 4-byte"):
        phalanx.quantize(packed)


@pytest.mark.parametrize("shape", [(), (128,), (2, 4, 128)])
def test_quantize_shape(shape):
    with pytest.raises(ValueError, match="x: .*expected a matrix"):
        phalanx.quantize(np.zeros(shape, np.float32))


def test_quantize_by_columns():
    with pytest.raises(ValueError, match="x is .*column stride is 128"):
        phalanx.quantize(np.zeros((256, 128), np.float32).T)


def test_quantize_out():
    x, data, scales = np.zeros((4, 256), np.float32), np.zeros((4, 256), E4M3), np.zeros((4, 2), np.float32)
    for out, part in [
        ((data[:3], scales), "q.data"),
        ((data, scales[:, :1]), "q.scales"),
        ((data, np.broadcast_to(scales[:1], (4, 2))), "read-only"),
        ((data, np.lib.stride_tricks.as_strided(scales, (4, 2), (0, 4))), "q.scales"),
    ]:
        with pytest.raises(ValueError, match=part):
            phalanx.quantize(x, out=out)
    with pytest.raises(TypeError, match=r"q\.data"):
        phalanx.quantize(x, out=(x, scales))
    with pytest.raises(TypeError, match="out: expected"):
        phalanx.quantize(x, out=data)


def test_dequantize():
    q = phalanx.quantize(np.ones((4, 256), np.float32))
    with pytest.raises(ValueError, match=r"q\.scales"):
        phalanx.dequantize((q.data, q.scales[:3]))
    with pytest.raises(ValueError, match="x is"):
        phalanx.dequantize(q, out=np.zeros((4, 255), np.float32))
    with pytest.raises(TypeError, match="x.*expected"):
        phalanx.dequantize(q, dtype=np.float64)
    with pytest.raises(ValueError, match="dtype: .*float16.*float32"):
        phalanx.dequantize(q, out=np.zeros((4, 256), np.float32), dtype=np.float16)
    with pytest.raises(TypeError, match="q: expected"):
        phalanx.dequantize(q.data.view(np.uint8)[0])


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def test_torch():
    torch = pytest.importorskip("torch")
    x = torch.zeros(4, 256)
    a, b = phalanx.quantize(x), phalanx.quantize(torch.zeros(128, 256), (128, 128))
    with pytest.raises(TypeError, match=r"a\.data.*int8.*expected"):
        phalanx.gemm_fp8((a.data.view(torch.int8), a.scales), b)
    with pytest.raises(TypeError, match=r"a\.scales: expected an array, got None"):
        phalanx.gemm_fp8((a.data, None), b)
    with pytest.raises(ValueError, match=r"a\.data.*expected two matrices"):
        phalanx.gemm_fp8((a.data[0], a.scales), b)
    with pytest.raises(ValueError, match="out_dtype"):
        phalanx.gemm_fp8(a, b, out=torch.zeros(4, 128), out_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="d is"):
        phalanx.gemm_fp8(a, b, out=torch.zeros(4, 120))
    for out_dtype in ("float32", np.float32):
        with pytest.raises(TypeError, match=r"dtype.* torch\.dtype"):
            phalanx.gemm_fp8(a, b, out_dtype=out_dtype)
        with pytest.raises(TypeError, match=r"dtype.* torch\.dtype"):
            phalanx.dequantize(a, dtype=out_dtype)


# --- the machine ------------------------------------------------------------------------------------------------------


def test_errors_of_the_machine_are_runtime_errors():
    for error in (phalanx.UnsupportedError, phalanx.CompilationError, phalanx.CudaError):
        assert issubclass(error, phalanx.Error) and issubclass(error, RuntimeError)


def test_a_gpu_that_is_not_there(good):
    """A view that claims to be on a GPU: without a driver that is unsupported, with one there is no device 99."""
    import tvm_ffi
    from phalanx import _native

    def claim(array, ordinal=99):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        device = tvm_ffi.device("cuda", ordinal)
        return _native.view(array.ctypes.data, tvm_ffi.dtype(array.dtype.name), array.shape, strides, device)

    (a, sfa), (b, sfb), out = good["a"], good["b"], good["out"]
    with pytest.raises((phalanx.UnsupportedError, ValueError), match=r"driver|99"):
        _native.gemm_fp8(*(claim(x) for x in (a, sfa, b, sfb, out)), None, 0, False, False, None)
    with pytest.raises(ValueError, match=r"b\.data.*device"):
        _native.gemm_fp8(claim(a), claim(sfa), claim(b, 98), claim(sfb), claim(out), None, 0, False, False, None)
