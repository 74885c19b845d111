"""Times Phalanx beside its peers on the GPU: a table, a JSON file and the plots. See bench/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

try:
    import torch  # noqa: F401
except ImportError:
    sys.exit("benchmarks need torch and a GPU of compute capability 9.0; torch is not installed")

from bench import ceilings as ceiling_probes
from bench import chain, host, machine, quantize
from bench.ahead import compile_ahead
from bench.cases import DEFAULT_GROUPS, SHAPES_PATH, SUITES, Problem, Shape, load_shapes, parse_shape
from bench.libraries import MAX_ERROR, OURS, Library, load
from bench.report import make_row, print_result, summarize, write_json
from bench.timing import L2Flush, interleaved

CHAIN = "chain"
RESULTS = Path(__file__).resolve().parent / "results"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--suite", type=words, default=(), help=f"suites instead of groups: {', '.join(SUITES)}, chain")
    add("--groups", type=words, default=DEFAULT_GROUPS, help="groups of the shapes file (default %(default)s)")
    add("--m", type=numbers, default=(), metavar="M,M", help="the groups' (N, K) at these M instead of their own")
    add("--shape", type=parse_shape, action="append", metavar="MxNxK", help="this shape instead; may be repeated")
    add("--shapes", type=Path, default=SHAPES_PATH, help="shapes file (default %(default)s)")
    add("--only", type=words, default=(), help="libraries to run, for example phalanx,deep_gemm")
    add("--out", type=Path, default=RESULTS, help="directory of the results (default %(default)s)")
    add("--name", help="name of the results' files (default: the suites' names, or dense_fp8)")
    add("--repeats", type=int, default=30, help="timed calls of each library and shape (default %(default)s)")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--quick", action="store_true", help="fewer repeats and a short look at the ceilings")
    add("--jobs", type=int, default=0, help="processes that compile everything first; some peers do so for each shape")
    add("--no-ceilings", action="store_true", help="do not probe the ceilings")
    add("--no-quantize", action="store_true", help="time the products only")
    add("--no-host", action="store_true", help="do not time the host's side of a call")
    add("--no-plot", action="store_true", help="write no plots")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.suite) - {*SUITES, CHAIN}:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join((*SUITES, CHAIN))}")
    arguments.name = arguments.name or "_".join(arguments.suite) or "dense_fp8"
    if arguments.quick:
        arguments.repeats = min(arguments.repeats, 20)
    return arguments


def run_shape(
    shape: Shape, libraries: list[Library], ceilings: dict, monitor: machine.Monitor, arguments: argparse.Namespace
) -> dict:
    """Prepares, checks and times every library on one shape. Who is wrong, or cannot do it, is left out and named."""
    problem = Problem(shape, arguments.seed)
    calls, errors, notes, skipped = {}, {}, {}, {}
    for library in libraries:
        try:
            call = library.prepare(problem, log)
            error = problem.check(call, problem.out)
        except Exception as reason:
            skipped[library.name] = f"{type(reason).__name__}: {reason}"[:300]
            log(f"{shape} {library.name}: {skipped[library.name]}")
            continue
        errors[library.name] = error
        if error < MAX_ERROR:  # NaN is not
            calls[library.name] = call
            notes[library.name] = library.note()
        else:
            skipped[library.name] = f"relative error {error:.2e}"
            log(f"{shape} {library.name}: WRONG, relative error {error:.2e}; not timed")
    problem.forget_reference()
    if not calls:
        raise RuntimeError(f"{shape}: no library did it: {skipped}")

    with monitor:
        samples = interleaved(calls, arguments.repeats, L2Flush())
    notes = {name: note for name, note in notes.items() if note}
    extra = {"notes": notes, "skipped": skipped, "clocks": monitor.summary()}
    return make_row("gemm_fp8", shape, samples, errors, ceilings, **extra)


def log(message: str) -> None:
    print(f"# {message}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    machine.require_gpu()
    return run(arguments)


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    if arguments.shape:
        return arguments.shape
    if arguments.suite:
        return [shape for suite in arguments.suite if suite != CHAIN for shape in SUITES[suite]()]
    return load_shapes(arguments.shapes, arguments.groups, arguments.m)


def run(arguments: argparse.Namespace) -> int:
    shapes = shapes_of(arguments)
    libraries, missing = load(arguments.only)
    for name, reason in missing.items():
        log(f"{name} is not here: {reason}")
    if not libraries:
        return 2

    if arguments.jobs:
        compile_ahead(shapes, arguments.only, arguments.jobs)
    monitor = machine.Monitor()
    result = machine.describe() | {
        "settings": {"repeats": arguments.repeats, "seed": arguments.seed, "quick": arguments.quick, "l2": "cold"},
        "missing": missing,
        "clocks": {"before": monitor.read()},
        "ceilings": {},
        "rows": [],
        "summary": {},
        "host": {},
    }
    path = arguments.out / f"{arguments.name}.json"
    started = time.monotonic()

    if not arguments.no_ceilings:
        with monitor:
            result["ceilings"] = {
                name: round(value, 3) for name, value in ceiling_probes.measure(arguments.quick, log).items()
            }
        result["clocks"]["ceilings"] = monitor.summary()
        write_json(result, path)
        log(f"ceilings after {time.monotonic() - started:.0f} s")

    wrong = 0
    for shape in shapes:
        try:
            row = run_shape(shape, libraries, result["ceilings"], monitor, arguments)
        except Exception as error:
            log(f"{shape}: {type(error).__name__}: {error}")
            wrong += 1
            continue
        wrong += OURS in row["skipped"]
        result["rows"].append(row)
        result["summary"] = summarize(result["rows"])
        write_json(result, path)  # after every row: an interrupted run keeps what it has
        times = ", ".join(f"{name} {stats['median']:.1f}" for name, stats in row["stats"].items())
        log(f"{shape}: {times} us, after {time.monotonic() - started:.0f} s")

    chain_rows = []
    if CHAIN in arguments.suite:
        try:
            with monitor:
                chain_rows = chain.measure(libraries, arguments.repeats, arguments.seed, log, arguments.m)
            result["clocks"]["chain"] = monitor.summary()
        except Exception as error:
            log(f"chain: {type(error).__name__}: {error}")
            wrong += 1
        wrong += sum(OURS in row["skipped"] for row in chain_rows)
        result["rows"] += chain_rows
        write_json(result, path)

    quantized = []
    for library in libraries:
        if library.name == OURS and not arguments.no_quantize:
            try:
                quantized = quantize.measure(library, result["ceilings"], arguments.repeats)
            except Exception as error:
                log(f"quantize: {type(error).__name__}: {error}")
                wrong += 1
    result["rows"] += quantized
    if not arguments.no_host:
        try:
            result["host"] = host.measure(libraries, log)
        except Exception as error:
            log(f"host: {type(error).__name__}: {error}")
    result["clocks"]["after"] = monitor.read()
    result["seconds"] = round(time.monotonic() - started, 1)
    write_json(result, path)
    if shapes:
        print_result(result)
    chain.print_rows(chain_rows)
    quantize.print_rows(quantized)
    host.print_measured(result["host"])
    print(f"written: {path}")
    if shapes and not arguments.no_plot:
        plot(path)
    return 1 if wrong else 0


def plot(path: Path) -> None:
    try:
        from bench.plot import plot_dense

        for written in plot_dense(path):
            print(f"written: {written}")
    except Exception as error:
        log(f"plots: {type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
