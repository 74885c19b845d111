"""What a warm call costs the host, and what the import costs: `python -m bench.host`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bench import machine

CALLS, REPEATS = 300, 15  # so few calls fit in the launch queue: the host never waits for the GPU
TINY = "64x512x512"  # little work: the GPU keeps up with the host

_IMPORT = """
import importlib, json, sys, time
before = set(sys.modules)
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
start = time.perf_counter()
module = importlib.import_module(sys.argv[1])
seconds = time.perf_counter() - start
module.__version__  # the library's own: loads the compiled part
ready = time.perf_counter() - start
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
tops -= set(sys.stdlib_module_names) | {sys.argv[1]}
others = sorted(top for top in tops if not top.startswith("_"))
print(json.dumps({"import": seconds, "ready": ready, "others": others}))
"""


def call_time(call: Callable[[], object], synchronize: Callable[[], None], calls: int = CALLS) -> float:
    """Microseconds of host time of one warm call: the median of the means over a queue of calls."""
    for _ in range(20):
        call()
    means = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        means.append((time.perf_counter_ns() - start) / calls * 1e-3)
    synchronize()
    return statistics.median(means)


def import_time(module: str = "phalanx", repeats: int = 5) -> dict[str, float]:
    """Seconds, in fresh processes, of `import module`; of the same with the compiled part loaded; and of that once the
    packages that it needs have been imported."""

    def fresh(first: list[str]) -> dict:
        command = [sys.executable, "-c", _IMPORT, module, json.dumps(first)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout.splitlines()[-1])

    others = fresh([])["others"]  # also warms the file cache
    alone = [fresh([]) for _ in range(repeats)]
    after = [fresh(others) for _ in range(repeats)]
    return {
        "import_s": round(statistics.median(run["import"] for run in alone), 4),
        "ready_s": round(statistics.median(run["ready"] for run in alone), 4),
        "ready_beyond_dependencies_s": round(statistics.median(run["ready"] for run in after), 4),
    }


def measure(libraries: list, log: Callable[[str], None]) -> dict:
    """{"call_us": {library: us}, "import_s": s, "ready_s": s, "ready_beyond_dependencies_s": s}"""
    import torch

    from bench.cases import Problem, parse_shape

    result: dict = {"call_us": {}, "shape": TINY}
    problem = Problem(parse_shape(TINY))
    for library in libraries:
        try:
            call = library.prepare(problem, log)
            result["call_us"][library.name] = round(call_time(call, torch.cuda.synchronize), 3)
        except Exception as error:
            log(f"host {library.name}: {type(error).__name__}: {str(error)[:200]}")
    try:
        result.update(import_time())
    except Exception as error:
        log(f"import time: {type(error).__name__}: {error}")
    return result


def print_measured(result: dict) -> None:
    times = ", ".join(f"{name} {time:.1f}" for name, time in result.get("call_us", {}).items())
    if times:
        print(f"host time of a warm call from torch, us: {times}")
    if "import_s" in result:
        ready, beyond = result["ready_s"], result["ready_beyond_dependencies_s"]
        print(
            f"import phalanx: {result['import_s']:.3f} s; ready {ready:.3f} s, {beyond:.3f} s beyond its dependencies"
        )


def main() -> None:
    from bench.libraries import load

    machine.require_gpu()
    libraries, missing = load(tuple(sys.argv[1:]))
    for name, reason in missing.items():
        print(f"# {name} is not here: {reason}", file=sys.stderr)
    print_measured(measure(libraries, lambda message: print(f"# {message}", file=sys.stderr)))


if __name__ == "__main__":
    main()
