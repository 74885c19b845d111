"""Rows, summaries and tables of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench.cases import Shape
from bench.libraries import FP8_PEERS, LABELS, OURS
from bench.timing import Sample


def make_row(
    op: str, shape: Shape, samples: dict[str, Sample], errors: dict[str, float], ceilings: dict[str, float], **extra
) -> dict:
    """One row of the JSON. Times are microseconds; our own figures are None if Phalanx did not run."""
    ours = samples.get(OURS)
    row = {
        "op": op,
        "group": shape.group,
        "shape": {"m": shape.m, "n": shape.n, "k": shape.k},
        "flops": shape.flops,
        "bytes": shape.num_bytes,
        "median_us": None,
        "peers": {name: round(sample.median, 3) for name, sample in samples.items() if name != OURS},
        "tflops": None,
        "gbps": None,
        "stats": {name: sample_stats(sample) for name, sample in samples.items()},
        "errors": {name: float(f"{error:.3g}") for name, error in errors.items()},
        **extra,
    }
    if ours:
        row["median_us"] = round(ours.median, 3)
        row["tflops"] = round(shape.flops / ours.median * 1e-6, 2)
        row["gbps"] = round(shape.num_bytes / ours.median * 1e-3, 1)
        row["speedup"] = {name: round(time / ours.median, 4) for name, time in row["peers"].items()}
        best = min((peer for peer in row["peers"] if peer in FP8_PEERS), key=row["peers"].get, default=None)
        if best:
            row["best_peer"] = {"name": best, "speedup": row["speedup"][best]}
        row.update(_share(shape, ours.median, ceilings))
    return row


def sample_stats(sample: Sample) -> dict[str, float]:
    figures = {"min": sample.min, "p10": sample.quantile(0.1), "median": sample.median, "p90": sample.quantile(0.9)}
    return {name: round(value, 3) for name, value in figures.items()}


def _share(shape: Shape, time_us: float, ceilings: dict[str, float]) -> dict:
    """The nearer of the two ceilings, how much of it is reached, and the least time: launch, then work at that rate."""
    limits = []
    if "mma_tflops" in ceilings:
        limits.append((shape.flops / ceilings["mma_tflops"] * 1e-6, "compute", "mma_tflops"))
    if "read_gbps" in ceilings:
        limits.append((shape.num_bytes / ceilings["read_gbps"] * 1e-3, "memory", "read_gbps"))
    if not limits:
        return {}
    work_us, bound, name = max(limits)
    floor_us = work_us + ceilings.get("empty_kernel_us", 0.0)
    return {
        "bound": bound,
        "ceiling": name,
        "share_of_ceiling": round(work_us / time_us, 4),
        "floor_us": round(floor_us, 3),
        "share_of_floor": round(floor_us / time_us, 4),
    }


def geomean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def gemm_rows(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["op"] == "gemm_fp8"]


def summarize(rows: list[dict]) -> dict[str, dict]:
    """Per M, for "M >= 1024" (the prefill shapes together) and for the odd shapes: geometric means of the speed-ups
    over each peer, and the shape that does worst."""
    groups: dict[str, list[dict]] = {}
    rows = [row for row in gemm_rows(rows) if row["median_us"]]
    for row in rows:
        groups.setdefault("odd" if row["group"] == "odd" else f"M={row['shape']['m']}", []).append(row)
    large = [row for row in rows if row["group"] != "odd" and row["shape"]["m"] >= 1024]
    if len({row["shape"]["m"] for row in large}) > 1:
        groups["M>=1024"] = large
    return {name: _summary(members) for name, members in groups.items()}


def _summary(rows: list[dict]) -> dict:
    peers = [peer for peer in LABELS if any(peer in row["speedup"] for row in rows)]
    means = {peer: geomean(row["speedup"][peer] for row in rows if peer in row["speedup"]) for peer in peers}
    summary = {"rows": len(rows), "speedup": {peer: round(value, 4) for peer, value in means.items() if value}}
    summary["worst"] = {}
    for peer in peers:
        row = min((row for row in rows if peer in row["speedup"]), key=lambda row: row["speedup"][peer])
        summary["worst"][peer] = {"shape": row["shape"], "speedup": row["speedup"][peer]}
    against_best = [row for row in rows if "best_peer" in row]
    if against_best:
        row = min(against_best, key=lambda row: row["best_peer"]["speedup"])
        summary["worst"]["best_peer"] = {"shape": row["shape"], **row["best_peer"]}
    for share in ("share_of_ceiling", "share_of_floor"):
        mean = geomean(row[share] for row in rows if share in row)
        summary[share] = round(mean, 4) if mean else None
    return summary


def write_json(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


# --- terminal ---------------------------------------------------------------------------------------------------------


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: our figures, then each peer's time and how much faster than it we are."""
    rows = gemm_rows(result["rows"])
    peers = [peer for peer in LABELS if peer != OURS and any(peer in row["peers"] for row in rows)]
    header = ["M", "N", "K", "us", "TFLOPS", "GB/s", "of ceiling", "floor us", *(_short(peer) for peer in peers)]
    lines = []
    for row in rows:
        shape = row["shape"]
        line = [str(shape["m"]), str(shape["n"]), str(shape["k"])]
        line += [_format(row["median_us"], ".1f"), _format(row["tflops"], ".0f"), _format(row["gbps"], ".0f")]
        share = row.get("share_of_ceiling")
        line.append(f"{share:.0%} {row['bound']}" if share else "-")
        line.append(_format(row.get("floor_us"), ".1f"))
        for peer in peers:
            time, ratio = row["peers"].get(peer), row.get("speedup", {}).get(peer)
            line.append("-" if time is None else f"{time:.1f}" + (f" ({ratio:.2f}x)" if ratio else ""))
        lines.append(line)
    return header, lines


def _short(peer: str) -> str:
    return LABELS[peer].split(" (")[0]


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def print_result(result: dict) -> None:
    header, lines = table(result)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(header, lines)
    else:
        view = Table(title=f"gemm_fp8 on {result['gpu']}, median us, cold L2; (x): how much faster Phalanx is")
        for title in header:
            view.add_column(title, justify="right")
        for line in lines:
            view.add_row(*line)
        Console(width=max(100, 15 * len(header))).print(view)
    _print_summary(result)


def _print_plain(header: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _print_summary(result: dict) -> None:
    for group, summary in result["summary"].items():
        worst = summary["worst"]
        means = ", ".join(
            f"{value:.3f}x {_short(peer)} (worst {worst[peer]['speedup']:.2f})"
            for peer, value in summary["speedup"].items()
        )
        if "best_peer" in worst:
            shape = "x".join(map(str, worst["best_peer"]["shape"].values()))
            means += f"; best peer: worst {worst['best_peer']['speedup']:.2f} at {shape}"
        line = f"{group}: geometric mean over {summary['rows']}: {means or 'no peers'}"
        if summary["share_of_ceiling"]:
            line += (
                f"; {summary['share_of_ceiling']:.1%} of the ceiling, {summary['share_of_floor']:.1%} with the launch"
            )
        print(line)
    print("ceilings: " + ", ".join(f"{name} {value:.5g}" for name, value in result["ceilings"].items()))
    for name, reason in result.get("missing", {}).items():
        print(f"not here: {name}: {reason}")
