"""FP8 matrix products with fine-grained scaling, for NVIDIA Hopper and, with the same calls, the CPU.

    a = phalanx.quantize(activations)                  # [M, K], one scale per 1 x 128
    b = phalanx.quantize(weights, block=(128, 128))    # [N, K], one scale per 128 x 128
    d = phalanx.gemm_fp8(a, b)                         # [M, N] = A · Bᵀ

Arrays are the caller's own: PyTorch (CPU and CUDA), CuPy, JAX, or NumPy with ml_dtypes; results are of the same
library, on the same device, computed on the library's current stream. Importing this package imports none of them.
"""

import sys as _sys

from phalanx._activation import swiglu_backward, swiglu_backward_both, swiglu_quantize, swiglu_quantize_both
from phalanx._api import Quantized, dequantize, gemm_fp8, quantize, quantize_both, quantize_transposed
from phalanx._bf16 import (
    gemm_bf16,
    grouped_gemm_bf16,
    grouped_gemm_bf16_indexed,
    grouped_gemm_bf16_masked,
    grouped_wgrad_bf16,
)
from phalanx._ep import Dispatched, ExpertParallel
from phalanx._errors import (
    AbortedError,
    CapacityError,
    CompilationError,
    CudaError,
    Error,
    PeerTimeoutError,
    UnsupportedError,
)
from phalanx._group import Group
from phalanx._grouped import (
    check_groups,
    grouped_gemm_fp8,
    grouped_gemm_fp8_indexed,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_swiglu,
    grouped_wgrad_fp8,
    wgrad_fp8,
)
from phalanx._moe import Routing, permute, route, route_and_permute, unpermute, unpermute_backward

__all__ = [
    "AbortedError",
    "CapacityError",
    "CompilationError",
    "CudaError",
    "Dispatched",
    "Error",
    "ExpertParallel",
    "Group",
    "PeerTimeoutError",
    "Quantized",
    "Routing",
    "UnsupportedError",
    "check_groups",
    "dequantize",
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
    "grouped_wgrad_fp8",
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
    "wgrad_fp8",
]


def version() -> str:
    """The version of the loaded library, "major.minor.patch"; `__version__` is the same."""
    from phalanx import _native

    return _native.version()


def __getattr__(name: str) -> str:
    if name == "__version__":
        return version()
    raise AttributeError(f"module 'phalanx' has no attribute {name!r}")


# So that torch.ops.phalanx is there, and torch.compile sees through the very first call. With torch imported later, the
# first eager call on a tensor, or `import phalanx.torch`, does the same.
if "torch" in _sys.modules:
    import phalanx.torch  # noqa: F401
