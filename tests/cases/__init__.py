"""One struct per operation: inputs, reference, tolerance, flops and bytes. Tests sweep them on every backend.

`shapes.json` holds the shapes by name, [M, N, K] each; the command's `bench` and the benchmarks read it too.
"""

from cases.arrays import NumPyArrays, TorchArrays
from cases.bf16 import GemmBf16Case, GroupedBf16Case, WgradBf16Case
from cases.gemm import GemmFp8Case
from cases.grouped import GroupedGemmCase, GroupedSwigluCase, WgradCase
from cases.moe import MoeCase, random_moe_cases
from cases.quantize import DequantizeCase, QuantizeCase, TransposedCase
from cases.shapes import random_shapes, shapes
from cases.swiglu import SwigluCase

__all__ = [
    "DequantizeCase",
    "GemmBf16Case",
    "GemmFp8Case",
    "GroupedBf16Case",
    "GroupedGemmCase",
    "GroupedSwigluCase",
    "MoeCase",
    "NumPyArrays",
    "QuantizeCase",
    "SwigluCase",
    "TorchArrays",
    "TransposedCase",
    "WgradBf16Case",
    "WgradCase",
    "random_moe_cases",
    "random_shapes",
    "shapes",
]
