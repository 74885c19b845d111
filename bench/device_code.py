"""Compiles a device header of this repository and launches kernels from it, on torch's current stream.

NVRTC through `cuda.bindings` where it is installed, else nvcc; launches through the driver itself, so that no
framework's idea of an architecture flag or an argument type stands between the probe and the chip.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ARCH = "sm_90a"


def compile_cubin(source: str) -> bytes:
    """The cubin of CUDA source that includes from the repository's root ("device/...")."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        return _compile_nvcc(source)
    return _compile_nvrtc(nvrtc, source)


def _compile_nvrtc(nvrtc, source: str) -> bytes:
    def check(status, *values):
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC: {status}")
        return values[0] if values else None

    program = check(*nvrtc.nvrtcCreateProgram(source.encode(), b"probe.cu", 0, [], []))
    options = [f"-arch={ARCH}", "-std=c++20", "-default-device", f"-I{ROOT}"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(check(*nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC: {bytes(log).decode(errors='replace')}")
    cubin = bytearray(check(*nvrtc.nvrtcGetCUBINSize(program)))
    check(*nvrtc.nvrtcGetCUBIN(program, cubin))
    return bytes(cubin)


def _compile_nvcc(source: str) -> bytes:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.TemporaryDirectory() as folder:
        input_path, output_path = Path(folder, "probe.cu"), Path(folder, "probe.cubin")
        input_path.write_text(source)
        target = f"arch=compute_{ARCH[3:]},code={ARCH}"
        command = [nvcc, "-std=c++20", f"-I{ROOT}", "-gencode", target, "-cubin", "-o", output_path, input_path]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr}")
        return output_path.read_bytes()


_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint32 * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "smem")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Module:
    """The kernels of one source text, loaded into torch's CUDA context."""

    def __init__(self, source: str):
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._cubin = compile_cubin(source)
        torch.zeros(1, device="cuda")  # makes torch's context current
        self._module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), self._cubin))
        self._functions: dict[str, ctypes.c_void_p] = {}

    def _check(self, status: int) -> None:
        if status:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(name))
            raise RuntimeError(f"CUDA driver: {(name.value or b'?').decode()} ({status})")

    def _function(self, name: str, smem_bytes: int) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            if smem_bytes > 48 * 1024:
                max_dynamic_shared_size_bytes = 8
                self._check(self._driver.cuFuncSetAttribute(function, max_dynamic_shared_size_bytes, smem_bytes))
            self._functions[name] = function
        return self._functions[name]

    def launch(
        self, name: str, grid: int, block: int, *args, smem_bytes: int = 0, cluster: int = 1, pdl: bool = False
    ) -> None:
        """Tensors go as pointers; other arguments are ctypes values (`c_int32`, `c_int64`, `tensor_map`'s).

        `pdl`: programmatic dependent launch, the kernel may start before its predecessor in the stream is done.
        """
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        attributes = (_LaunchAttribute * 2)()
        attributes[0].id, attributes[0].value[:3] = _CLUSTER_DIMENSION, (cluster, 1, 1)
        attributes[1].id, attributes[1].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, int(pdl)
        stream = torch.cuda.current_stream().cuda_stream
        config = _LaunchConfig(grid, 1, 1, block, 1, 1, smem_bytes, stream, attributes, len(attributes))
        function = self._function(name, smem_bytes)
        self._check(self._driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))

    def tensor_map(self, matrix: torch.Tensor, box_rows: int, box_cols: int) -> ctypes.Array:
        """The argument `TensorMap` for a row-major matrix of bytes, copied in boxes with the 128-byte swizzle."""
        storage = ctypes.create_string_buffer(192)
        offset = -ctypes.addressof(storage) % 64
        encoded = (ctypes.c_char * 128).from_buffer(storage, offset)
        dims = (ctypes.c_uint64 * 2)(matrix.shape[1], matrix.shape[0])
        strides = (ctypes.c_uint64 * 1)(matrix.stride(0))
        box, steps = (ctypes.c_uint32 * 2)(box_cols, box_rows), (ctypes.c_uint32 * 2)(1, 1)
        u8, rank, interleave, swizzle_128b, promote_256b, fill = 0, 2, 0, 3, 3, 0
        data = ctypes.c_void_p(matrix.data_ptr())
        self._check(
            self._driver.cuTensorMapEncodeTiled(
                encoded, u8, rank, data, dims, strides, box, steps, interleave, swizzle_128b, promote_256b, fill
            )
        )
        return encoded
