"""What a split of K over a cluster costs beside plain streaming: each matrix alone, then the best ones as the chain."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from bench.device_code import Module
from bench.timing import Call, Captured, L2Flush, interleaved

ROWS_OF_D = 64
CONFIGS = [  # (rows of weights in a tile, split of K, stages): two CTAs fit on an SM
    *((128, split, 4) for split in (1, 2, 4)),
    *((64, split, 10) for split in (1, 2, 4, 8)),
    *((32, split, 20) for split in (1, 2, 4)),
]

_KERNEL = """
extern "C" __global__ void __launch_bounds__(128) split_{rows}_{split}(const __grid_constant__ TensorMap map,
                                                                       const SplitStream p) {{
  split_stream<{m}, {rows}, {split}, {stages}>(map, p);
}}"""
SOURCE = "\n".join(
    [
        '#include "bench/probe/split_stream.cuh"',
        "using namespace phalanx;",
        "using namespace phalanx::probe;",
        *(_KERNEL.format(m=ROWS_OF_D, rows=rows, split=split, stages=stages) for rows, split, stages in CONFIGS),
    ]
)


def smem_bytes(rows: int, stages: int) -> int:
    return stages * (rows * 128 + 8) + 4 * ROWS_OF_D * (rows + 8)


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("d", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("num_k_blocks", ctypes.c_int),
        ("reduce", ctypes.c_int),
        ("wait_first", ctypes.c_int),
    )


def measure(layers: list[list[torch.Tensor]], log: Callable[[str], None], repeats: int = 20) -> dict:
    """Microseconds of each matrix for every configuration, with the sum and without; and of a layer of the chain."""
    module, flush = Module(SOURCE), L2Flush()
    out = torch.empty(ROWS_OF_D * max(w.shape[0] for w in layers[0]), dtype=torch.bfloat16, device="cuda")

    def call(weights: torch.Tensor, config: tuple[int, int, int], reduce: bool, pdl: bool, wait_first: bool) -> Call:
        rows, split, stages = config
        n, k = weights.shape
        parameters = _Parameters(out.data_ptr(), n, k // 128, reduce, wait_first)
        grid = -(-n // rows) * split
        arguments = (f"split_{rows}_{split}", grid, 128, module.tensor_map(weights, rows, 128), parameters)
        return functools.partial(module.launch, *arguments, smem_bytes=smem_bytes(rows, stages), cluster=split, pdl=pdl)

    result: dict = {"alone_us": {}, "chain": {}}
    best = []
    for weights in layers[0]:
        n, k = weights.shape
        calls = {}
        for config in CONFIGS:
            for reduce in (False, True):
                name = f"{config[0]} rows, split {config[1]}{', reduced' if reduce else ''}"
                calls[name] = call(weights, config, reduce, False, False)
        samples = interleaved(calls, repeats, flush)
        result["alone_us"][f"{n}x{k}"] = {name: round(sample.median, 2) for name, sample in samples.items()}
        reduced = {name: samples[name].median for name in calls if name.endswith("reduced")}
        fastest = min(reduced, key=reduced.get)
        best.append(CONFIGS[list(reduced).index(fastest)])
        log(
            f"split stream, {n}x{k}: {fastest}, {reduced[fastest]:.2f} us;"
            f" without the sum {samples[fastest.removesuffix(', reduced')].median:.2f}"
        )

    calls = {}
    for reduce in (False, True):
        for name, pdl, wait_first in (("plain", False, True), ("pdl", True, False)):
            kernels = [
                call(weights, config, reduce, pdl, wait_first)
                for layer in layers
                for weights, config in zip(layer, best, strict=True)
            ]
            calls[f"{name}{', reduced' if reduce else ''}"] = Captured(kernels)
    layer_bytes = sum(weights.numel() for weights in layers[0])
    for name, sample in interleaved(calls, repeats, flush).items():
        time = sample.median / len(layers)
        result["chain"][name] = {"us_per_layer": round(time, 2), "gbps": round(layer_bytes / time * 1e-3)}
        log(f"split stream chain, {name}: {time:.1f} us a layer, {layer_bytes / time * 1e-3:.0f} GB/s")
    return result
