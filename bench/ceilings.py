"""What this chip can do at most, measured in the same run as everything else: chips and moments differ by percents.

Units: *_tflops are 1e12 operations a second (a multiply-add counts two), *_gbps 1e9 bytes a second, *_us microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import statistics
from collections.abc import Callable

import torch

from bench.device_code import Module
from bench.timing import HEAD_START_CYCLES, Call, L2Flush, interleaved

READ_SIZES_MB = (4, 8, 15, 30, 60, 119, 256, 512, 4096)
MMA_WIDTHS = (128, 256)
MMA_THREADS, MMA_STAGES, MMA_K = 256, 4, 128  # as in bench/probe/mma_rate.cuh
FLOPS_PER_SM_AND_CYCLE, BOOST_HZ = 8192, 1.98e9  # of an H100 or H200: no probe can exceed their product

_READ = """
extern "C" __global__ void __launch_bounds__(1024) read_{depth}(const u8* data, i64 num_bytes, u32* sink) {{
  probe::read_bandwidth<{depth}>(data, num_bytes, sink);
}}"""
_MMA = """
extern "C" __global__ void __launch_bounds__(256, 1) mma_{n}(const u32* operands, int iterations,
                                                                        float* sink, int keep) {{
  probe::mma_rate<{n}>(operands, iterations, sink, keep);
}}"""
SOURCE = "\n".join(
    [
        '#include "bench/probe/mma_rate.cuh"',
        '#include "bench/probe/read_bandwidth.cuh"',
        "using namespace phalanx;",
        *(_READ.format(depth=depth) for depth in (4, 8)),
        *(_MMA.format(n=n) for n in MMA_WIDTHS),
        'extern "C" __global__ void empty() {}',
    ]
)


def measure(quick: bool, log: Callable[[str], None], only: tuple[str, ...] = ()) -> dict[str, float]:
    """All ceilings, or those of some probes. A probe that fails is logged and left out; the others still count."""
    ceilings: dict[str, float] = {}
    flush = L2Flush()
    probes = [("copy", lambda: _copy(quick, flush))]
    try:
        module = Module(SOURCE)
    except Exception as error:
        log(f"ceilings: the probes do not compile or load: {error}")
    else:
        probes += [
            ("empty kernel", lambda: _empty(module, flush)),
            ("read", lambda: _read(module, quick, flush)),
            ("mma", lambda: _mma(module, quick)),
        ]
    for name, probe in probes:
        if only and name not in only:
            continue
        try:
            ceilings.update(probe())
        except Exception as error:
            log(f"ceilings: {name}: {type(error).__name__}: {error}")
    return ceilings


def _copy(quick: bool, flush: L2Flush) -> dict[str, float]:
    num_bytes = (1 if quick else 2) << 30
    source = torch.empty(num_bytes // 8, dtype=torch.int64, device="cuda").random_()
    target = torch.empty_like(source)
    time = interleaved({"copy": lambda: target.copy_(source)}, 10, flush)["copy"].median
    return {"copy_gbps": 2 * num_bytes / time * 1e-3}


def _empty(module: Module, flush: L2Flush) -> dict[str, float]:
    calls = {"empty": lambda: module.launch("empty", 1, 32), "events": lambda: None}
    times = interleaved(calls, 20, flush)
    return {"empty_kernel_us": times["empty"].median, "events_us": times["events"].median}


def _read(module: Module, quick: bool, flush: L2Flush) -> dict[str, float]:
    sizes = [int(mb * 1e6) // 4096 * 4096 for mb in READ_SIZES_MB if not (quick and mb > 512)]
    data = torch.empty(max(sizes) // 8, dtype=torch.int64, device="cuda").random_()
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def launch(depth: int, ctas_per_sm: int, num_bytes: int) -> None:
        module.launch(f"read_{depth}", ctas_per_sm * num_sms, 1024, data, ctypes.c_int64(num_bytes), sink)

    def calls(num_bytes: int) -> dict[str, Call]:
        variants = itertools.product((4, 8), (1, 2))
        return {f"{depth} {ctas}": functools.partial(launch, depth, ctas, num_bytes) for depth, ctas in variants}

    ceilings = {}
    for num_bytes in sizes:
        best = min(sample.median for sample in interleaved(calls(num_bytes), 10, flush).values())
        ceilings[f"read_gbps_{num_bytes / 1e6:.0f}MB"] = num_bytes / best * 1e-3
    ceilings["read_gbps"] = max(ceilings.values())
    return ceilings


def random_e4m3(num_bytes: int) -> torch.Tensor:
    """Normal values with one scale per 128, as quantisation makes them."""
    x = torch.randn(num_bytes // 128, 128, device="cuda")
    return (x * (448 / x.abs().amax(1, keepdim=True))).to(torch.float8_e4m3fn)


def _mma(module: Module, quick: bool) -> dict[str, float]:
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    ceilings = {}
    for n in MMA_WIDTHS:
        operands = random_e4m3(MMA_STAGES * (128 + n) * MMA_K)
        iterations = 300 * 128 // n  # about 0.35 ms
        short = _mma_rates(module, n, operands, iterations, repeats=10, pause_cycles=4_000_000)
        long = _mma_rates(module, n, operands, 30 * iterations, repeats=40 if quick else 100, pause_cycles=0)
        ceilings[f"mma_short_n{n}_tflops"] = statistics.median(short)
        ceilings[f"mma_sustained_n{n}_tflops"] = statistics.median(long[len(long) // 2 :])
    ceilings["mma_tflops"] = max(ceilings[f"mma_short_n{n}_tflops"] for n in MMA_WIDTHS)
    ceilings["mma_sustained_tflops"] = max(ceilings[f"mma_sustained_n{n}_tflops"] for n in MMA_WIDTHS)
    peak = num_sms * FLOPS_PER_SM_AND_CYCLE * BOOST_HZ * 1e-12
    if ceilings["mma_tflops"] > 1.02 * peak:  # a compiler that drops products shows here
        raise RuntimeError(f"the probe claims {ceilings['mma_tflops']:.0f} TFLOPS, the chip can do {peak:.0f}")
    return ceilings


def _mma_rates(
    module: Module, n: int, operands: torch.Tensor, iterations: int, repeats: int, pause_cycles: int
) -> list[float]:
    """TFLOPS of each of `repeats` launches, with a pause before each in which the chip does nothing."""
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    sink = torch.zeros(MMA_THREADS, device="cuda")

    def launch(count: int) -> None:
        args = (operands, ctypes.c_int32(count), sink, ctypes.c_int32(0))
        module.launch(f"mma_{n}", num_sms, MMA_THREADS, *args, smem_bytes=operands.numel())

    launch(1)
    events = []
    torch.cuda._sleep(HEAD_START_CYCLES)
    for _ in range(repeats):
        if pause_cycles:
            torch.cuda._sleep(pause_cycles)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch(iterations)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    flops = iterations * 2 * num_sms * MMA_STAGES * 128 * n * MMA_K
    return [flops / start.elapsed_time(end) * 1e-9 for start, end in events]
