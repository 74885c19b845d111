"""The decode chain: a layer's six products one after another, for eight layers of distinct weights, as one CUDA graph.

What a serving engine does for each token: 1.85 GB of weights are read, so no L2 holds them, and launches stand in line.
Beside the libraries, in turn with them, runs the probe that only streams the same weights (bench/probe/weight_stream).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import DECODE_ROWS, Problem, Shape, load_shapes, make_layers
from bench.libraries import MAX_ERROR, OURS, Library
from bench.probe.weight_stream import BEST, WeightStream
from bench.report import geomean, sample_stats
from bench.timing import Call, Captured, L2Flush, interleaved

LAYERS = 8
PROBE = "probe, pdl"
Log = Callable[[str], None]


def measure(
    libraries: list[Library], repeats: int, seed: int, log: Log, rows_of_d: tuple[int, ...] = DECODE_ROWS
) -> list[dict]:
    """One row of the JSON for each M; times are microseconds of a layer."""
    weights = make_layers(LAYERS, seed)
    probes = _probes([[data for data, _ in layer] for layer in weights], log)
    return [_row(m, weights, libraries, probes, repeats, seed, log) for m in rows_of_d or DECODE_ROWS]


def _probes(layers: list[list[torch.Tensor]], log: Log) -> dict[str, Call]:
    try:
        stream = WeightStream()
        calls = {f"probe {variant}, pdl": stream.chain(layers, variant, "pdl") for variant in BEST}
        return calls | {"probe, no pdl": stream.chain(layers, BEST[-1], "plain")}
    except Exception as error:
        log(f"chain: no probe: {type(error).__name__}: {error}")
        return {}


def _row(
    m: int, weights: list, libraries: list[Library], probes: dict[str, Call], repeats: int, seed: int, log: Log
) -> dict:
    shapes = [Shape("chain", m, shape.n, shape.k) for shape in load_shapes(groups=("decode",))]
    problems = [
        Problem(shape, seed, weights=pair) for layer in weights for shape, pair in zip(shapes, layer, strict=True)
    ]
    calls, errors, skipped = {}, {}, {}
    for library in libraries:
        try:
            library.constant_weights = True
            replay = Captured([library.prepare(problem, log) for problem in problems])
            errors[library.name] = _largest_error(replay, problems)
        except Exception as reason:
            skipped[library.name] = f"{type(reason).__name__}: {reason}"[:300]
            log(f"chain M={m} {library.name}: {skipped[library.name]}")
            continue
        if errors[library.name] < MAX_ERROR:  # NaN is not
            calls[library.name] = replay
        else:
            skipped[library.name] = f"relative error {errors[library.name]:.2e}"
            log(f"chain M={m} {library.name}: WRONG, relative error {errors[library.name]:.2e}; not timed")
    for problem in problems:
        problem.forget_reference()

    samples = {
        name: sample.scaled(1 / LAYERS) for name, sample in interleaved(calls | probes, repeats, L2Flush()).items()
    }
    return _figures(m, shapes, samples, errors, skipped)


def _largest_error(replay: Call, problems: list[Problem]) -> float:
    """Of all the products of one replay, on poisoned outputs; NaN if anything was not written."""
    for problem in problems:
        problem.out.fill_(float("nan"))
    replay()
    torch.cuda.synchronize()
    return float(torch.tensor([problem.error_of(problem.out) for problem in problems]).max())


def _figures(m: int, shapes: list[Shape], samples: dict, errors: dict, skipped: dict) -> dict:
    weight_bytes = sum(shape.n * shape.k for shape in shapes)
    medians = {name: sample.median for name, sample in samples.items()}
    with_pdl = [time for name, time in medians.items() if name.startswith("probe ")]
    probe = {PROBE: min(with_pdl), "probe, no pdl": medians["probe, no pdl"]} if with_pdl else {}
    row = {
        "op": "decode_chain",
        "group": "chain",
        "shape": {"m": m, "layers": LAYERS},
        "bytes": weight_bytes,
        "flops": sum(shape.flops for shape in shapes),
        "median_us": None,
        "peers": {name: round(time, 3) for name, time in medians.items() if name != OURS and "probe" not in name},
        "probe_us": {name: round(time, 3) for name, time in probe.items()},
        "stats": {name: sample_stats(sample) for name, sample in samples.items()},
        "errors": {name: float(f"{error:.3g}") for name, error in errors.items()},
        "skipped": skipped,
    }
    if ours := medians.get(OURS):
        row["median_us"] = round(ours, 3)
        row["tflops"] = round(row["flops"] / ours * 1e-6, 2)
        row["gbps"] = round(weight_bytes / ours * 1e-3, 1)
        row["speedup"] = {name: round(time / ours, 4) for name, time in row["peers"].items()}
        row["share_of_probe"] = round(probe[PROBE] / ours, 4) if probe else None
    return row


def print_rows(rows: list[dict]) -> None:
    if rows:
        print("decode chain, us a layer (GB/s of weights); (x): how much faster Phalanx is")
    for row in rows:
        gbps = {name: row["bytes"] / time * 1e-3 for name, time in row["probe_us"].items()}
        parts = [f"{name} {time:.1f} ({gbps[name]:.0f})" for name, time in row["probe_us"].items()]
        if row["median_us"]:
            share = f", {row['share_of_probe']:.1%} of the probe" if row["share_of_probe"] else ""
            parts.insert(0, f"phalanx {row['median_us']:.1f} ({row['gbps']:.0f}{share})")
        parts += [
            f"{name} {time:.1f}" + (f" ({row['speedup'][name]:.2f}x)" if row["median_us"] else "")
            for name, time in row["peers"].items()
        ]
        print(f"  M={row['shape']['m']}: " + ", ".join(parts))
    for peer in rows[0]["peers"] if rows else ():
        mean = geomean(row["speedup"][peer] for row in rows if row["median_us"] and peer in row["speedup"])
        if mean:
            print(f"  geometric mean {mean:.3f}x {peer}")
