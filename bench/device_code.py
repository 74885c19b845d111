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

    def launch(self, name: str, grid: int, block: int, *args, smem_bytes: int = 0) -> None:
        """Tensors go as pointers; other arguments are ctypes values (`c_int32`, `c_int64`)."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self._function(name, smem_bytes)
        self._check(self._driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, smem_bytes, stream, pointers, None))
