"""What Phalanx needs of an array library, and the operations in those terms."""

from typing import Any

from phalanx import _native


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def num_blocks(n: int) -> int:
    return -(-n // 128)


# Of arguments after the first, which may be no arrays at all.


def no_array(name: str, value: Any) -> TypeError:
    return TypeError(f"{name}: expected an array, got {type(value).__name__}")


def shape_of(name: str, array: Any) -> tuple[int, ...]:
    try:
        return tuple(array.shape)
    except AttributeError:
        raise no_array(name, array) from None


def dtype_of(name: str, array: Any) -> Any:
    try:
        return array.dtype
    except AttributeError:
        raise no_array(name, array) from None


def check_integer(name: str, value: Any) -> None:
    # The first question is all that torch.compile understands of a size that it does not know.
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{name}: {value!r}; expected an integer")


def check_count(name: str, value: Any) -> None:
    check_integer(name, value)
    if value < 0:
        raise ValueError(f"{name}: {value}; expected 0 or more")


def foreign(array: Any, library: str) -> Any:
    """What tvm-ffi would take for a tensor though it is of another library, as a reason for the module to refuse it,
    which knows the argument's name; anything else as it is."""
    if not hasattr(array, "__dlpack__"):
        return array
    return "TypeError", f"an array of {type(array).__module__.partition('.')[0]}; expected one of {library}"


def matrix_shape(name: str, array: Any) -> tuple[int, int]:
    shape = shape_of(name, array)
    if len(shape) != 2:
        raise ValueError(f"{name}: shape {shape}; expected a matrix")
    return shape


def check_untraced(out: Any) -> None:
    """Of operations whose traced form makes new arrays only."""
    if out is not None:
        raise ValueError("out: given to a call that is traced; expected none")


class Framework:
    """One array library. A subclass supplies the hooks; PyTorch's also short-cuts the operations."""

    e4m3: Any  # dtypes, as the library names them
    bf16: Any
    f32: Any
    i32: Any

    def empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, like: Any) -> Any:
        """A new matrix, or a stack of them, of these strides (in elements) on `like`'s device."""
        raise NotImplementedError

    def view(self, array: Any) -> Any:
        """Something that tvm-ffi passes as a tensor, alive as long as `array`."""
        raise NotImplementedError

    def writable_view(self, array: Any) -> Any:
        return self.view(array)

    def check_writable(self, name: str, array: Any) -> None:
        """A caller's array, not a new one, may be written."""

    def stream(self, like: Any) -> int | None:
        """The current stream of `like`'s device; None leaves it to tvm-ffi (or to no one, on the CPU)."""
        return None

    def itemsize(self, dtype: Any) -> int:
        raise NotImplementedError

    def device_of(self, like: Any) -> tuple[bool, int]:
        """Whether it is CUDA, and its ordinal."""
        return False, 0

    def check_out(self, out: Any, dtype: Any, name: str = "out_dtype") -> None:
        """`out` may be written, and nothing else was asked for by the argument `name`."""
        if dtype is not None and dtype_of("out", out) != dtype:
            raise ValueError(f"{name}: {dtype}; expected that of out, {out.dtype}, or none")

    def is_traced(self, *arrays: Any) -> bool:
        """Whether calls on these arrays go to `traced`: one of them is enough."""
        return False

    def needs_gradient(self, *arrays: Any) -> bool:
        """Whether calls on these arrays (some may be None) are recorded, and go to `traced` for that."""
        return False

    def traced(self, name: str, operands: tuple, out: Any, new: tuple, options: tuple) -> Any:
        """The operation as an operator of the library: `new` are the options that shape a new result."""
        raise NotImplementedError

    def finish(self, like: Any) -> None:
        """Called after the work has been enqueued."""

    def run(self, name: str, arguments: tuple, like: Any, out: Any) -> Any:
        """Enqueues what the module calls `name`, with views and options, where `like` is computed. Returns `out`."""
        getattr(_native, name)(*arguments, self.stream(like))
        self.finish(like)
        return out

    # --- allocation ---------------------------------------------------------------------------------------------------

    def empty_rows(self, rows: int, cols: int, dtype: Any, like: Any) -> Any:
        """Row-major, rows padded to 16 bytes."""
        return self.empty((rows, cols), (padded(cols, 16 // self.itemsize(dtype)), 1), dtype, like)

    def empty_quantized(self, rows: int, cols: int, blocks: bool, like: Any) -> tuple[Any, Any]:
        """Data and scales; those of 1 x 128 blocks MN-major, columns padded to 16 bytes, so that TMA can read them."""
        data = self.empty_rows(rows, cols, self.e4m3, like)
        if blocks:
            scales = self.empty((num_blocks(rows), num_blocks(cols)), (num_blocks(cols), 1), self.f32, like)
        else:
            scales = self.empty((rows, num_blocks(cols)), (1, padded(rows, 4)), self.f32, like)
        return data, scales

    def empty_quantized_both(self, rows: int, cols: int, like: Any) -> tuple[Any, Any, Any, Any]:
        return *self.empty_quantized(rows, cols, False, like), *self.empty_quantized(cols, rows, False, like)

    # --- operations ---------------------------------------------------------------------------------------------------

    def gemm_fp8(self, a, sfa, b, sfb, c, out, out_dtype, num_sms, batch_invariant, constant_b):
        if out is None:
            if out_dtype is None:
                out_dtype = self.bf16 if c is None else dtype_of("c", c)
            out = self.empty_rows(matrix_shape("a.data", a)[0], matrix_shape("b.data", b)[0], out_dtype, a)
        else:
            self.check_out(out, out_dtype)
        view = self.view
        c_view = None if c is None else view(c)
        out_view = self.writable_view(out)
        operands = view(a), view(sfa), view(b), view(sfb), out_view, c_view
        return self.run("gemm_fp8", (*operands, num_sms, batch_invariant, constant_b), a, out)

    def quantize(self, x, blocks, pow2_scales, out):
        if out is None:
            out = self.empty_quantized(*matrix_shape("x", x), blocks, x)
        else:
            self.check_out(out, None)
        data, scales = out
        data_view, scales_view = self.writable_view(data), self.writable_view(scales)
        return self.run("quantize", (self.view(x), data_view, scales_view, blocks, pow2_scales), x, (data, scales))

    def quantize_transposed(self, x, pow2_scales, out):
        if self.is_traced(x):
            check_untraced(out)
            return self.traced("quantize_transposed", (x,), None, (), (pow2_scales,))
        if out is None:
            out = self.empty_quantized(*reversed(matrix_shape("x", x)), False, x)
        else:
            self.check_out(out, None)
        data, scales = out
        data_view, scales_view = self.writable_view(data), self.writable_view(scales)
        return self.run("quantize_transposed", (self.view(x), data_view, scales_view, pow2_scales), x, (data, scales))

    def quantize_both(self, x, pow2_scales):
        if self.is_traced(x):
            return self.traced("quantize_both", (x,), None, (), (pow2_scales,))
        out = self.empty_quantized_both(*matrix_shape("x", x), x)
        return self.run("quantize_both", (self.view(x), *map(self.writable_view, out), pow2_scales), x, out)

    def dequantize(self, data, scales, out, dtype):
        if out is None:
            out = self.empty_rows(*matrix_shape("q.data", data), self.f32 if dtype is None else dtype, data)
        else:
            self.check_out(out, dtype, "dtype")
        return self.run("dequantize", (self.view(data), self.view(scales), self.writable_view(out)), data, out)
