"""What the run ran on: GPU, driver, versions, commit; and its clocks, power and temperature while it runs."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def require_gpu() -> None:
    """Ends the program with status 2 where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        print("benchmarks need a GPU; torch sees none", file=sys.stderr)
        raise SystemExit(2)


def commit() -> str:
    """PHALANX_COMMIT, else what git says, "+" for uncommitted changes."""
    if os.environ.get("PHALANX_COMMIT"):
        return os.environ["PHALANX_COMMIT"]
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict:
    """What the head of every results file says: GPU, date, commit, versions."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name(0),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that a figure may depend on."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for name in ("phalanx", "triton", "deep_gemm", "vllm"):
        try:
            found[name] = str(getattr(__import__(name), "__version__", "unknown"))
        except Exception:
            continue
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
    except Exception:
        found["driver"] = _smi("driver_version") or "unknown"
    return found


def _smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


class Monitor:
    """Samples SM and memory clock (MHz), power (W) and temperature (C) in the background, through NVML.

    Without NVML every answer is empty; a benchmark does not fail for it.
    """

    FIELDS = ("sm_mhz", "mem_mhz", "power_w", "temperature_c")

    def __init__(self, interval_s: float = 0.02):
        self._interval = interval_s
        self._samples: list[tuple[float, ...]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handle = None
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = self._find(pynvml, torch.cuda.get_device_properties(0))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    @staticmethod
    def _find(nvml, properties):
        """NVML numbers devices by its own order: match torch's first device by UUID where it tells one."""
        uuid = str(getattr(properties, "uuid", ""))
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found = nvml.nvmlDeviceGetUUID(handle)
            found = found.decode() if isinstance(found, bytes) else found
            if uuid and uuid in found:
                return handle
        return nvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> dict[str, float]:
        """One sample, now."""
        sample = self._sample()
        return dict(zip(self.FIELDS, sample, strict=True)) if sample else {}

    def _sample(self) -> tuple[float, ...] | None:
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        try:
            return (
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            )
        except Exception:
            return None

    def __enter__(self) -> Monitor:
        self._samples.clear()
        self._stop.clear()
        if self._handle is not None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.is_set():
            sample = self._sample()
            if sample:
                self._samples.append(sample)
            time.sleep(self._interval)

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def summary(self) -> dict[str, float]:
        """Median clocks, lowest SM clock, highest power and temperature of the samples taken inside the `with`."""
        if not self._samples:
            return {}
        sm, mem, power, temperature = zip(*self._samples, strict=True)
        return {
            "sm_mhz": statistics.median(sm),
            "sm_mhz_min": min(sm),
            "mem_mhz": statistics.median(mem),
            "power_w_max": max(power),
            "temperature_c_max": max(temperature),
        }
