"""CuPy. It has no E4M3: data is uint8, the elements' bytes. BF16 is ml_dtypes', from CuPy 14 on."""

import cupy
import numpy as np
import tvm_ffi

from phalanx._frameworks import by_type
from phalanx._frameworks.base import Framework, foreign
from phalanx._frameworks.numpy import itemsize_of, ml_dtypes, num_elements, view_or_reason

_E4M3 = tvm_ffi.dtype("float8_e4m3fn")


class CuPy(Framework):
    e4m3 = np.dtype(np.uint8)
    f32 = np.dtype(np.float32)
    i32 = np.dtype(np.int32)

    @property
    def bf16(self):
        return np.dtype(ml_dtypes().bfloat16)

    def itemsize(self, dtype):
        return itemsize_of(dtype)

    def empty(self, shape, strides, dtype, like):
        size = self.itemsize(dtype)
        with like.device:
            memory = cupy.cuda.alloc(num_elements(shape, strides) * size)
        return cupy.ndarray(shape, dtype, memory, strides=tuple(stride * size for stride in strides))

    def view(self, array):
        if not isinstance(array, cupy.ndarray):
            return foreign(array, "CuPy")  # the module names the argument
        dtype = _E4M3 if array.dtype == self.e4m3 else None
        return view_or_reason(array.data.ptr, array, tvm_ffi.device("cuda", array.device.id), dtype)

    def device_of(self, like):
        return True, like.device.id

    def stream(self, like):
        return cupy.cuda.get_current_stream(like.device.id).ptr


framework = CuPy()
by_type[cupy.ndarray] = framework
