"""Times GEMM configurations against each other on one shape, for whoever tunes the planner.

    python -m bench.sweep 4096x7168x2048 --config block_m=256,block_n=128,num_stages=3 --config block_m=128,block_n=192
    python -m bench.sweep 64x7168x2048 --grid "block_m=64;block_n=64|128;num_stages=4|6|8;split_k=1|2|4"

Each goes to the planner through PHALANX_GEMM_CONFIG, which names the fields that are to differ from its own choice. All
are timed interleaved, with a cold L2; what does not fit, fails to compile or is wrong is listed and left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from bench import machine
from bench.cases import Problem, Shape, parse_shape
from bench.libraries import MAX_ERROR, OURS, load
from bench.timing import L2Flush, interleaved, with_gemm_config

PLANNER = "(planner)"


def expand(grid: str) -> list[str]:
    """ "a=1|2;b=3" -> ["a=1,b=3", "a=2,b=3"]"""
    fields = [part.strip().partition("=") for part in grid.split(";") if part.strip()]
    choices = [[f"{name}={value}" for value in values.split("|")] for name, _, values in fields]
    return [",".join(combination) for combination in itertools.product(*choices)]


def sweep(shape: Shape, configs: list[str], peers: tuple[str, ...], repeats: int, seed: int) -> list[dict]:
    """One record for each configuration and peer, fastest first; those that failed last, with the reason."""
    problem = Problem(shape, seed)
    libraries, missing = load((OURS, *peers))
    failed = [{"config": name, "error": reason} for name, reason in missing.items()]
    calls, errors = {}, {}
    for library in libraries:
        call = library.prepare(problem, lambda message: print(f"# {message}", file=sys.stderr))
        variants = {library.name: call}
        if library.name == OURS:
            variants = {config: with_gemm_config(config, call) for config in configs}
            variants[PLANNER] = with_gemm_config("", call)
        for name, variant in variants.items():
            try:
                errors[name] = problem.check(variant, problem.out)
            except Exception as error:
                failed.append({"config": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
                continue
            if errors[name] < MAX_ERROR:
                calls[name] = variant
            else:
                failed.append({"config": name, "error": f"WRONG: relative error {errors[name]:.2e}"})
    problem.forget_reference()
    samples = interleaved(calls, repeats, L2Flush()) if calls else {}
    with_gemm_config("", lambda: None)()

    timed = [
        {
            "config": name,
            "median_us": round(sample.median, 3),
            "min_us": round(sample.min, 3),
            "tflops": round(shape.flops / sample.median * 1e-6, 1),
            "gbps": round(shape.num_bytes / sample.median * 1e-3, 1),
            "error": errors[name],
        }
        for name, sample in samples.items()
    ]
    return sorted(timed, key=lambda record: record["median_us"]) + failed


def print_records(shape: Shape, records: list[dict]) -> None:
    print(f"\n{shape}: median us (min), TFLOPS, GB/s")
    for record in records:
        if "median_us" not in record:
            print(f"  failed   {record['config']}: {record['error']}")
            continue
        times = f"{record['median_us']:9.2f} ({record['min_us']:9.2f})"
        print(f"  {times} {record['tflops']:7.0f} {record['gbps']:7.0f}  {record['config']}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("shapes", nargs="+", type=parse_shape, metavar="MxNxK")
    add("--config", action="append", default=[], help="fields of one configuration, block_m=256,num_stages=3")
    add("--grid", action="append", default=[], help='all combinations of "block_m=128|256;num_stages=3|4"')
    add("--peer", action="append", default=[], help="a library to time beside them, for example deep_gemm")
    add("--repeats", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file for the records")
    arguments = parser.parse_args()
    machine.require_gpu()

    configs = arguments.config + [config for grid in arguments.grid for config in expand(grid)]
    results = {}
    for shape in arguments.shapes:
        records = sweep(shape, configs, tuple(arguments.peer), arguments.repeats, arguments.seed)
        print_records(shape, records)
        results[str(shape)] = records
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
