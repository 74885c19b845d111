"""Plots of results files, as SVG and PNG: `python -m bench.plot bench/results/dense_fp8.json bench/results/ep*.json`.

Of expert parallelism, files of several numbers of GPUs give one plot more, against ranks, beside the first.

The background is transparent and the ink a middle grey: the pictures read on a light page and on a dark one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

INK, FAINT = "#7d8590", "#7d859055"
FLOOR_LABEL = "a launch, then every byte at the rate of a kernel that only reads"
STYLE = {  # order of the bars; Phalanx is the only one in a strong colour
    "phalanx": ("Phalanx", "#f97316"),
    "deep_gemm": ("DeepGEMM", "#3b82f6"),
    "torch_scaled_mm": ("cuBLASLt FP8 (torch._scaled_mm)", "#76a832"),
    "cutlass": ("CUTLASS (vLLM)", "#d96ba0"),
    "triton": ("Triton", "#a371c9"),
    "cublaslt_bf16": ("cuBLASLt BF16", "#9aa4af"),
}
RC = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "phalanx",  # the same data gives the same file
}


def plot_dense(path: Path) -> list[Path]:
    """Draws prefill (TFLOPS) over decode (GB/s) from the JSON at `path`, beside it; returns the files written."""
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["op"] == "gemm_fp8"]
    large = [row for row in rows if row["shape"]["m"] >= 1024]
    small = [row for row in rows if row["shape"]["m"] == 64] or [row for row in rows if row["shape"]["m"] < 1024]
    panels = [(draw, members) for draw, members in ((_draw_tflops, large), (_draw_gbps, small)) if members]
    if not panels:
        raise ValueError(f"{path}: no gemm_fp8 rows")

    with plt.rc_context(RC):
        figure, axes = plt.subplots(len(panels), 1, figsize=(10.5, 3.6 * len(panels) + 0.7), squeeze=False)
        for (draw, members), ax in zip(panels, axes[:, 0], strict=True):
            draw(ax, members, result["ceilings"])
        _legend(figure, axes[0, 0])
        figure.text(0.995, 0.005, _caption(result), ha="right", va="bottom", fontsize=7.5)
        figure.tight_layout(rect=(0, 0.02, 1, 0.95))
        return _save(figure, path)


def _save(figure, path: Path) -> list[Path]:
    written = [path.with_suffix(".svg"), path.with_suffix(".png")]
    for target in written:
        metadata = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(target, transparent=True, dpi=160, metadata=metadata)
    plt.close(figure)
    return written


EP_COLORS = {
    "dispatch e4m3": "#f97316",
    "dispatch e4m3, handle": "#f9a316",
    "dispatch bf16": "#3b82f6",
    "dispatch bf16 as e4m3": "#a371c9",
    "combine bf16": "#76a832",
}


def _plain(result: dict) -> list[dict]:
    """Rows of the throughput regime with even routing, and tokens on every rank."""
    return [row for row in result["throughput"] if not row.get("hot") and not row.get("empty_rank")]


def plot_expert_parallel(path: Path) -> list[Path]:
    """Time by number of SMs beside the probes' rates, from `bench.ep`'s JSON at `path`, beside it."""
    result = json.loads(path.read_text())
    plain = _plain(result)
    tokens = min(row["tokens"] for row in plain)
    with plt.rc_context(RC):
        figure, (times, rates) = plt.subplots(1, 2, figsize=(10.5, 4.2))
        counts = sorted({row["sms"] for row in plain if row["tokens"] == tokens})
        for i, (op, color) in enumerate(EP_COLORS.items()):
            points = sorted((row["sms"], row["us"]) for row in plain if row["op"] == op and row["tokens"] == tokens)
            if len(counts) > 1:
                times.plot(*zip(*points, strict=True), "o-", color=color, label=op)
            elif points:  # of one number there is no curve
                times.bar_label(
                    times.bar(i, points[0][1], color=color, label=op), fmt="%.0f", fontsize=8.5, color=color
                )
        for row in result.get("deep_ep", []):
            if (color := EP_COLORS.get(row["op"].split(" (")[0])) and len(counts) > 1:
                times.plot(row["sms"], row["us"], "x", color=color, label=f"DeepEP, {row['op']}")
        for name, label in (("store", "to the peer"), ("local store", "to its own memory")):
            points = sorted((int(sms), gbps) for sms, gbps in result["links_gbps"].get(name, {}).items())
            if points:
                rates.plot(*zip(*points, strict=True), "o-", color=INK if name == "store" else FAINT, label=label)
        _finish(times, "us", f"{tokens} tokens a rank, by SMs: lower is better")
        _finish(rates, "GB/s", "what the SMs store, and nothing else")
        for ax in (times, rates):
            ax.set_xlabel("SMs")
            ax.set_ylim(0)
        if len(counts) == 1:
            times.set_xticks([(len(EP_COLORS) - 1) / 2], [str(counts[0])])
        for ax in (times, rates):
            ax.legend(frameon=False, fontsize=8.5, labelcolor=INK)
        caption = f"{result['gpu']}, commit {result.get('commit', '?')}; the slowest rank's median, cold L2"
        figure.text(0.995, 0.005, caption, ha="right", va="bottom", fontsize=7.5)
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        return _save(figure, path)


def plot_ranks(paths: list[Path]) -> list[Path]:
    """Times and remote-only bandwidth by number of ranks, from `bench.ep`'s JSON of several numbers of GPUs."""
    results = {int(result["gpu"].split()[0]): result for result in (json.loads(path.read_text()) for path in paths)}
    ranks = sorted(results)
    of_ranks = {r: [row for row in _plain(results[r]) if row["tokens"] == 4096] for r in ranks}
    most = min(max(row["sms"] for row in rows) for rows in of_ranks.values())
    with plt.rc_context(RC):
        figure, (times, rates, latencies) = plt.subplots(1, 3, figsize=(12.5, 4.2))
        for op, color in EP_COLORS.items():
            rows = [row for r in ranks for row in of_ranks[r] if row["op"] == op and row["sms"] == most]
            times.plot(ranks, [row["us"] for row in rows], "o-", color=color, label=op)
            rates.plot(ranks, [row["wire_gbps"] for row in rows], "o-", color=color)
        links = [results[r]["links_gbps"]["store"][str(most)] for r in ranks]
        rates.plot(ranks, links, "o--", color=INK, label="stores to one peer, and nothing else")
        for op, color in (("latency dispatch", "#a371c9"), ("latency combine", "#76a832")):
            for key, style in (("us", "o-"), ("graph_us", "o--")):
                points = [
                    max(r["latency"], key=lambda row: (row["op"] == op, row["sms"]))[key] for r in results.values()
                ]
                label = op if key == "us" else f"{op}, in a graph"
                latencies.plot(list(results), points, style, color=color, label=label)
        _finish(times, "us", f"4096 tokens a rank, {most} SMs: lower is better")
        _finish(rates, "GB/s, remote bytes only", "the same: higher is better")
        _finish(latencies, "us", "128 tokens a rank: lower is better")
        for ax in (times, rates, latencies):
            ax.set_xlabel("ranks")
            ax.set_xticks(ranks)
            ax.set_ylim(0)
            ax.legend(frameon=False, fontsize=8, labelcolor=INK)
        commits = ", ".join(sorted({str(result.get("commit", "?")) for result in results.values()}))
        caption = f"NVIDIA H200, commit {commits}; the slowest rank's median, cold L2"
        figure.text(0.995, 0.005, caption, ha="right", va="bottom", fontsize=7.5)
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        return _save(figure, paths[0].with_name("ep_ranks.json"))


def _draw_tflops(ax: Axes, rows: list[dict], ceilings: dict[str, float]) -> None:
    _bars(ax, rows, lambda row, time: row["flops"] / time * 1e-6, "{:.0f}")
    ceiling = ceilings.get("mma_tflops")
    if ceiling:
        ax.axhline(ceiling, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        ax.text(ax.get_xlim()[1], ceiling, f"tensor cores alone: {ceiling:.0f} ", ha="right", va="bottom", fontsize=8.5)
        ax.set_ylim(0, ceiling * 1.13)
    _finish(ax, "TFLOPS", f"FP8 GEMM, {_ms(rows)}: higher is better")


def _draw_gbps(ax: Axes, rows: list[dict], ceilings: dict[str, float]) -> None:
    _bars(ax, rows, lambda row, time: row["bytes"] / time * 1e-3, "{:.0f}")
    top = 0.0
    for x, row in enumerate(rows):
        if row.get("bound") == "memory":
            figure = row["bytes"] / row["floor_us"] * 1e-3
            label = FLOOR_LABEL if not top else None
            ax.plot(
                [x - 0.45, x + 0.45], [figure, figure], color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=label
            )
            top = max(top, figure)
    if top:
        handles, labels = ax.get_legend_handles_labels()
        picked = [pair for pair in zip(handles, labels, strict=True) if pair[1] == FLOOR_LABEL]
        ax.legend(*zip(*picked, strict=True), loc="upper right", frameon=False, fontsize=8.5, labelcolor=INK)
        ax.set_ylim(0, max(ax.get_ylim()[1], top * 1.18))
    _finish(ax, "GB/s (FP8 bytes)", f"FP8 GEMM, {_ms(rows)}: higher is better")


def _bars(ax: Axes, rows: list[dict], figure_of, value_format: str) -> None:
    names = [name for name in STYLE if any(_time(row, name) for row in rows)]
    width = 0.84 / max(1, len(names))
    for i, name in enumerate(names):
        label, color = STYLE[name]
        points = [(x, figure_of(row, _time(row, name))) for x, row in enumerate(rows) if _time(row, name)]
        offset = (i - (len(names) - 1) / 2) * width
        bars = ax.bar([x + offset for x, _ in points], [y for _, y in points], width * 0.92, color=color, label=label)
        if name == "phalanx":
            texts = [value_format.format(y) for _, y in points]
            ax.bar_label(bars, texts, padding=1.5, fontsize=8, color=color, fontweight="bold")
    several = len({row["shape"]["m"] for row in rows}) > 1
    ax.set_xticks(range(len(rows)), [_name(row["shape"], several) for row in rows], fontsize=8.5)
    ax.set_xlim(-0.6, len(rows) - 0.4)


def _time(row: dict, name: str) -> float | None:
    return row["median_us"] if name == "phalanx" else row["peers"].get(name)


def _name(shape: dict[str, int], with_m: bool) -> str:
    rest = f"N {shape['n']}\nK {shape['k']}"
    return f"M {shape['m']}\n{rest}" if with_m else rest


def _ms(rows: list[dict]) -> str:
    return "M = " + ", ".join(map(str, dict.fromkeys(row["shape"]["m"] for row in rows)))


def _finish(ax: Axes, unit: str, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    ax.set_ylabel(unit)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)


def _legend(figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9, labelcolor=INK)


def _caption(result: dict) -> str:
    versions = result.get("versions", {})
    parts = [result["gpu"], f"torch {versions.get('torch', '?')}", f"commit {result['commit']}", result["date"][:10]]
    return ", ".join(parts) + "; median, cold L2, all interleaved in one run"


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]]
    of_ranks = [path for path in paths if "throughput" in json.loads(path.read_text())]
    written = [file for path in paths for file in (plot_expert_parallel if path in of_ranks else plot_dense)(path)]
    if len(of_ranks) > 1:
        written += plot_ranks(of_ranks)
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
