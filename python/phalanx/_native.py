"""The compiled module, loaded when one of its functions is first looked up: `import phalanx` stays quick.

The functions take DLPack views and write into them; see python/bindings. `_api` and the frameworks call them as
`_native.gemm_fp8(...)`, which after the first time is a plain module attribute.
"""

import os
from pathlib import Path
from typing import Any

from phalanx import _errors
from phalanx._nvrtc import hint_nvrtc

_FUNCTIONS = (
    "check_groups",
    "dequantize",
    "ep_bytes",
    "ep_check",
    "ep_combine",
    "ep_create",
    "ep_dispatch",
    "ep_info",
    "ep_num_rows",
    "ep_release",
    "expert_mlp",
    "expert_mlp_bytes",
    "gemm_bf16",
    "gemm_fp8",
    "grouped_gemm_bf16",
    "grouped_gemm_bf16_indexed",
    "grouped_gemm_bf16_masked",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_indexed",
    "grouped_gemm_fp8_masked",
    "grouped_gemm_fp8_swiglu",
    "grouped_wgrad_bf16",
    "group_abort",
    "group_barrier",
    "group_close",
    "group_info",
    "group_local",
    "group_nccl",
    "group_nccl_comm",
    "group_process",
    "group_release",
    "nccl_id",
    "permute",
    "quantize",
    "quantize_both",
    "quantize_transposed",
    "route",
    "route_and_permute",
    "swiglu_backward",
    "swiglu_backward_both",
    "swiglu_quantize",
    "swiglu_quantize_both",
    "unpermute",
    "unpermute_backward",
    "version",
    "view",
    "wgrad_fp8",
)


def library_dir() -> Path:
    """Where the compiled module is: PHALANX_LIBRARY_DIR (a build tree), else this package."""
    return Path(os.environ.get("PHALANX_LIBRARY_DIR") or Path(__file__).parent)


def _load() -> None:
    path = library_dir() / "libphalanx_python.so"
    if not path.exists():
        raise ImportError(
            f"{path} does not exist: install the package with `pip install .`, or let PHALANX_LIBRARY_DIR name the "
            "directory that holds the built libphalanx_python.so"
        )
    hint_nvrtc()

    import tvm_ffi

    for error in _errors.Error.__subclasses__():
        tvm_ffi.register_error(f"phalanx.{error.__name__}", error)
    module = tvm_ffi.load_module(str(path))
    globals().update({name: getattr(module, name) for name in _FUNCTIONS})


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]
