"""Rows for quantisation and back: memory-bound, so the ceiling is a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.libraries import Phalanx
from bench.timing import L2Flush, interleaved

SHAPES = ((64, 7168), (4096, 7168), (7168, 16384))
BLOCKS = {"quantize_rows": (1, 128), "quantize_blocks": (128, 128)}


def measure(ours: Phalanx, ceilings: dict[str, float], repeats: int) -> list[dict]:
    """One row for each operation and shape, in the form of the GEMM's; BF16 input, and BF16 output of `dequantize`."""
    return [row for m, k in SHAPES for row in _rows(ours, m, k, ceilings, repeats)]


def _rows(ours: Phalanx, m: int, k: int, ceilings: dict[str, float], repeats: int) -> list[dict]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    calls, results = {}, {}
    for op, block in BLOCKS.items():
        results[op] = ours.module.quantize(x, block=block)
        calls[op] = _quantize(ours, x, block, results[op])
    back = torch.empty_like(x)
    calls["dequantize"] = lambda: ours.module.dequantize(results["quantize_rows"], out=back)

    samples = interleaved(calls, repeats, L2Flush())
    scales = {op: 4 * result[1].numel() for op, result in results.items()}
    scales["dequantize"] = scales["quantize_rows"]
    rows = []
    for op, sample in samples.items():
        num_bytes = 3 * m * k + scales[op]  # BF16 on one side, E4M3 on the other
        row = {
            "op": op,
            "shape": {"m": m, "k": k},
            "bytes": num_bytes,
            "median_us": round(sample.median, 3),
            "peers": {},
            "tflops": 0.0,
            "gbps": round(num_bytes / sample.median * 1e-3, 1),
        }
        if "copy_gbps" in ceilings:
            row |= {"bound": "memory", "ceiling": "copy_gbps"}
            row["share_of_ceiling"] = round(row["gbps"] / ceilings["copy_gbps"], 4)
        rows.append(row)
    return rows


def _quantize(ours: Phalanx, x: torch.Tensor, block: tuple[int, int], out) -> Callable[[], object]:
    return lambda: ours.module.quantize(x, block=block, out=out)


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        share = f", {row['share_of_ceiling']:.0%} of a copy" if "share_of_ceiling" in row else ""
        shape = f"{row['shape']['m']}x{row['shape']['k']}"
        print(f"{row['op']} {shape}: {row['median_us']:.1f} us, {row['gbps']:.0f} GB/s{share}")
