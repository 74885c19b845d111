"""Timing of calls on the GPU: interleaved, with a cold L2, and with the launch latency hidden."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of 50 to 60 MB
HEAD_START_CYCLES = 12_000_000  # 6 ms: the GPU waits while the host fills the queue
REPEATS_PER_BLOCK = 10

GEMM_CONFIG = "PHALANX_GEMM_CONFIG"

Call = Callable[[], object]


@dataclass
class Sample:
    """Times of one call, in microseconds."""

    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def min(self) -> float:
        return min(self.times)

    def scaled(self, factor: float) -> Sample:
        return Sample([time * factor for time in self.times])

    def quantile(self, q: float) -> float:
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


class L2Flush:
    """Writes a buffer much larger than the L2, so that nothing of the operands is left in it."""

    def __init__(self, num_bytes: int = FLUSH_BYTES):
        self._buffer = torch.empty(num_bytes // 4, dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        self._buffer.zero_()


def _order(names: list[str], repeat: int) -> list[str]:
    """Rotates, and turns round every other time: nobody always comes first, or always after the same neighbour."""
    turn = repeat % len(names)
    rotated = names[turn:] + names[:turn]
    return rotated[::-1] if repeat % 2 else rotated


def interleaved(calls: dict[str, Call], repeats: int, flush: Call | None = None, warmup: int = 3) -> dict[str, Sample]:
    """Times every call `repeats` times, in turn. An L2 flush stands before each call; events stand right around it.

    A block of repeats is enqueued whole before anything waits for it: the GPU is always behind the host, so that an
    interval holds one call's work and the gap between two kernels, but no launch latency.
    """
    flush = flush or L2Flush()
    names = list(calls)
    for name in names:
        for _ in range(warmup):
            calls[name]()
    torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in names}
    for first in range(0, repeats, REPEATS_PER_BLOCK):
        events = []
        torch.cuda._sleep(HEAD_START_CYCLES)
        for repeat in range(first, min(repeats, first + REPEATS_PER_BLOCK)):
            for name in _order(names, repeat):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush()
                start.record()
                calls[name]()
                end.record()
                events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: Sample(values) for name, values in times.items()}


def same_copy(num_bytes: int) -> Call:
    """A copy that moves as many bytes, read and written."""
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Captured:
    """One CUDA graph of all these calls, which run once before it is made. Keeps them, and so their memory, alive."""

    def __init__(self, calls: list[Call]):
        self._calls, self._graph = calls, torch.cuda.CUDAGraph()
        for call in calls:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()

    def __call__(self) -> None:
        self._graph.replay()


def allow_gemm_configs() -> None:
    """Before the first product: a process that starts without the variable never looks at it again."""
    os.environ.setdefault(GEMM_CONFIG, "")


def with_gemm_config(config: str, call: Call) -> Call:
    """`call` by this configuration of a product; by the planner's if it is empty."""

    def wrapped() -> object:
        os.environ[GEMM_CONFIG] = config
        return call()

    return wrapped
