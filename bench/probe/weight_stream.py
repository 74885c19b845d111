"""How fast weights can stream through shared memory, launch after launch: alone, and as the decode chain."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from bench.device_code import Module
from bench.timing import Call, Captured, L2Flush, interleaved

CHUNK_BYTES = 16384
VARIANTS = {  # name: (CTAs on an SM, stages, boxes, interleaved)
    "1x12": (1, 12, False, False),
    "2x6": (2, 6, False, False),
    "1x12 interleaved": (1, 12, False, True),
    "2x6 interleaved": (2, 6, False, True),
    "1x12 boxes": (1, 12, True, False),
    "2x6 boxes": (2, 6, True, False),
}
LAUNCHES = {"plain": (False, True), "pdl, loads after the wait": (True, True), "pdl": (True, False)}  # pdl, wait first
BEST = (
    "2x6",
    "1x12 interleaved",
    "2x6 interleaved",
)  # with "pdl", the ceiling of the decode chain

_KERNEL = """
extern "C" __global__ void __launch_bounds__(32) stream_{stages}_{boxes:d}(const __grid_constant__ TensorMap map,
                                                                           const WeightStream p) {{
  weight_stream<{stages}, {boxes:d}>(map, p);
}}"""
SOURCE = "\n".join(
    [
        '#include "bench/probe/weight_stream.cuh"',
        "using namespace phalanx;",
        "using namespace phalanx::probe;",
        *dict.fromkeys(_KERNEL.format(stages=stages, boxes=boxes) for _, stages, boxes, _ in VARIANTS.values()),
    ]
)


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_chunks", ctypes.c_int),
        ("num_k_blocks", ctypes.c_int),
        ("wait_first", ctypes.c_int),
        ("interleaved", ctypes.c_int),
    )


class WeightStream:
    """Launches the probe over weights [N, K] of one byte each; K a multiple of 128, N * K of 16 KB."""

    def __init__(self) -> None:
        self._module = Module(SOURCE)
        self._num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def call(self, weights: torch.Tensor, variant: str, launch: str) -> Call:
        """A call that streams these weights."""
        ctas, stages, boxes, interleaved = VARIANTS[variant]
        pdl, wait_first = LAUNCHES[launch]
        n, k = weights.shape
        chunks = -(-n // 128) * (k // 128) if boxes else n * k // CHUNK_BYTES
        parameters = _Parameters(weights.data_ptr(), chunks, k // 128, wait_first, interleaved)
        tensor_map = self._module.tensor_map(weights, 128, 128)
        return functools.partial(
            self._module.launch,
            f"stream_{stages}_{boxes:d}",
            ctas * self._num_sms,
            32,
            tensor_map,
            parameters,
            smem_bytes=stages * (CHUNK_BYTES + 8),
            pdl=pdl,
        )

    def chain(self, layers: list[list[torch.Tensor]], variant: str, launch: str) -> Call:
        """Replays one CUDA graph that streams the weights of all layers, one matrix a kernel."""
        return Captured([self.call(weights, variant, launch) for layer in layers for weights in layer])


def measure(layers: list[list[torch.Tensor]], log: Callable[[str], None], repeats: int = 20) -> dict:
    """Microseconds of a layer and GB/s for every variant and way to launch; and of each matrix alone, cold."""
    stream = WeightStream()
    calls = {}
    for variant in VARIANTS:
        for launch in LAUNCHES:
            calls[f"{variant}, {launch}"] = stream.chain(layers, variant, launch)
    flush = L2Flush()
    layer_bytes = sum(weights.numel() for weights in layers[0])
    chain = {}
    for name, sample in interleaved(calls, repeats, flush).items():
        time = sample.median / len(layers)
        chain[name] = {"us_per_layer": round(time, 2), "gbps": round(layer_bytes / time * 1e-3)}
        log(f"weight stream chain, {name}: {time:.1f} us a layer, {layer_bytes / time * 1e-3:.0f} GB/s")

    alone = {}
    for weights in layers[0]:
        n, k = weights.shape
        calls = {variant: stream.call(weights, variant, "plain") for variant in VARIANTS}
        samples = interleaved(calls, repeats, flush)
        alone[f"{n}x{k}"] = {name: round(sample.median, 2) for name, sample in samples.items()}
        log(f"weight stream alone, {n}x{k}: {alone[f'{n}x{k}']}")
    return {"chain": chain, "alone_us": alone}
