"""Where the demo computes: NumPy on the CPU, torch on a GPU. The model uses only names that the two share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor


@dataclass(frozen=True)
class Arrays:
    """A namespace of array functions (`xp`), and the way to it and back."""

    xp: ModuleType
    name: str
    put: Callable[[np.ndarray], Array]
    get: Callable[[Array], np.ndarray]
    wait: Callable[[], None]

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Median time of `work`, after one run that plans and compiles."""
        times = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times[1:])


def on_cpu() -> Arrays:
    """NumPy."""
    return Arrays(np, f"NumPy on the CPU, {os.cpu_count()} threads", np.asarray, np.asarray, lambda: None)


def on_gpu() -> Arrays | None:
    """Torch on the first GPU that Phalanx has kernels for, or None."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    return Arrays(
        torch,
        f"torch on {torch.cuda.get_device_name()}",
        lambda x: torch.asarray(x, device="cuda"),
        lambda x: x.cpu().numpy(),
        torch.cuda.synchronize,
    )
