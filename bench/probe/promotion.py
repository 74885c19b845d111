"""Tensor-core rate with promotion, by the phase between the warpgroups."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from bench.ceilings import random_e4m3
from bench.device_code import Module
from bench.timing import interleaved

TILES = [(128, 2, 1), (192, 2, 1), (128, 2, 2), (128, 3, 1)]  # N, warpgroups, waves of 64 rows each
PHASES = ("bare", "free", "lockstep", "ordered")
SKEWS = (64, 128, 256, 512)  # cycles
STAGES = 4
ITERATIONS = 200

_KERNEL = """
extern "C" __global__ void __launch_bounds__({threads}, 1) {name}(const u32* operands, const float* scales,
                                                        int iterations, int skew, float* sink, int keep) {{
  promotion<{n}, {warpgroups}, {waves}, Phase::{phase}>(operands, scales, iterations, skew, sink, keep);
}}"""


def _name(tile: tuple[int, int, int], phase: str) -> str:
    return "promotion_{}_{}_{}_".format(*tile) + phase


SOURCE = "\n".join(
    [
        '#include "bench/probe/promotion.cuh"',
        "using namespace phalanx;",
        "using namespace phalanx::probe;",
        *(
            _KERNEL.format(
                name=_name(tile, phase),
                n=tile[0],
                warpgroups=tile[1],
                waves=tile[2],
                threads=tile[1] * 128,
                phase=phase,
            )
            for tile in TILES
            for phase in PHASES
        ),
    ]
)


def measure(log: Callable[[str], None], repeats: int = 20) -> dict:
    """TFLOPS of each tile in each phase."""
    module = Module(SOURCE)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    scales = torch.rand(STAGES, device="cuda") + 0.5
    sink = torch.zeros(1024, device="cuda")
    result = {}
    for tile in TILES:
        n, warpgroups, waves = tile
        operands = random_e4m3(STAGES * (warpgroups * waves * 64 + n) * 128)

        def call(phase: str, skew: int, tile=tile, operands=operands) -> Callable[[], None]:
            numbers = [ctypes.c_int32(ITERATIONS), ctypes.c_int32(skew), sink, ctypes.c_int32(0)]
            arguments = (_name(tile, phase), num_sms, tile[1] * 128, operands, scales, *numbers)
            return functools.partial(module.launch, *arguments, smem_bytes=operands.numel())

        calls = {phase: call(phase, 0) for phase in PHASES}
        calls |= {f"skewed by {skew}": call("free", skew) for skew in SKEWS}
        flops = 2 * ITERATIONS * STAGES * num_sms * warpgroups * waves * 64 * n * 128
        samples = interleaved(calls, repeats)
        title = f"{warpgroups * waves * 64}x{n}, {warpgroups} warpgroups"
        result[title] = {name: round(flops / sample.median * 1e-6) for name, sample in samples.items()}
        log(f"promotion, {title}, TFLOPS: {result[title]}")
    return result
