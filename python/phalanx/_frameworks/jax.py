"""JAX. Arrays are immutable: every result is a fresh array, written before anyone sees it.

JAX does not tell its streams to eager calls, so inputs are waited for, the work runs on the legacy default stream, and
is waited for too. Inside jax.jit none of this applies: its calls go to jax_traced.py.
"""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import tvm_ffi

from phalanx._errors import CudaError
from phalanx._frameworks.base import Framework, foreign
from phalanx._frameworks.numpy import itemsize_of, view_or_reason
from phalanx._moe import Routing

_DEFAULT_STREAM = 0


class Jax(Framework):
    e4m3 = np.dtype(jnp.float8_e4m3fn)
    bf16 = np.dtype(jnp.bfloat16)
    f32 = np.dtype(jnp.float32)
    i32 = np.dtype(jnp.int32)

    def itemsize(self, dtype):
        return itemsize_of(dtype)

    def empty(self, shape, strides, dtype, like):
        device = _device(like)
        if getattr(like, "committed", True):
            return jnp.empty(shape, dtype, device=device)
        with jax.default_device(device):  # as free to move as `like` is
            return jnp.empty(shape, dtype)

    def view(self, array):
        if isinstance(array, jax.core.Tracer):
            return "TypeError", "traced by jax.grad or vmap; expected an array, as these have no rule for it"
        if not isinstance(array, jax.Array):
            return foreign(array, "JAX")  # the module names the argument
        array.block_until_ready()
        device = _device(array)
        ffi_device = (
            tvm_ffi.device("cuda", device.local_hardware_id) if device.platform == "gpu" else tvm_ffi.device("cpu")
        )
        return view_or_reason(array.unsafe_buffer_pointer(), array, ffi_device, strides=_strides(array))

    def stream(self, like):
        return _DEFAULT_STREAM

    def finish(self, like):
        device = _device(like)
        if device.platform == "gpu":
            _synchronize(device.local_hardware_id)

    def device_of(self, like):
        device = _device(like)
        return device.platform == "gpu", device.local_hardware_id or 0

    def check_writable(self, name, array):
        if array is not None:
            raise ValueError(f"{name}: JAX arrays are immutable; expected none")

    def check_out(self, out, dtype, name="out_dtype"):
        self.check_writable("out", out)


def _strides(array) -> tuple[int, ...]:
    """In elements. Most arrays are row-major, but jax.device_put and jax.jit may be asked for any order."""
    where = getattr(array, "format", None) or getattr(array, "layout", None)  # before 0.6, `layout`
    layout = getattr(where, "layout", None) or getattr(where, "device_local_layout", None)  # before 0.7, the second
    order = getattr(layout, "major_to_minor", None) or range(array.ndim)
    strides, stride = [0] * array.ndim, 1
    for axis in reversed(order):
        strides[axis], stride = stride, stride * array.shape[axis]
    return tuple(strides)


def _device(array):
    devices = array.devices()
    if len(devices) != 1:
        raise ValueError(f"an array sharded over {len(devices)} devices; expected one device")
    return next(iter(devices))


def _synchronize(ordinal: int) -> None:
    """Waits for the legacy default stream of a device, whose primary context is the one that JAX and Phalanx use."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        code = getattr(driver, name)(*arguments)
        if code != 0:
            raise CudaError(f"{name} returned {code}")

    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
    try:
        call("cuCtxPushCurrent_v2", context)
        try:
            call("cuStreamSynchronize", ctypes.c_void_p(_DEFAULT_STREAM))
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", ordinal)


eager = Jax()

# Its arrays are what JAX transforms, and max_rows belongs to the function that is compiled.
jax.tree_util.register_pytree_node(
    Routing, lambda routing: (tuple(routing[:5]), routing.max_rows), lambda max_rows, arrays: Routing(*arrays, max_rows)
)


def framework_of(array: jax.Array) -> Framework:
    # A function that is compiled may call with constants alone; then nothing but a new array tells.
    if not isinstance(array, jax.core.Tracer) and not isinstance(jnp.empty(()), jax.core.Tracer):
        return eager
    from phalanx._frameworks.jax_traced import TracedJax

    return TracedJax()
