"""The BF16 products beside cuBLAS (torch.matmul): python -m bench.bf16 [--m 4096,64] [--configs ...]

Dense products of DeepSeek-V3's six (N, K), then other majors and groups. Results: bench/results/bf16.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import phalanx
import torch

from bench import ceilings as ceiling_probes
from bench import machine
from bench.cases import load_shapes
from bench.grouped import Case, measure, relative_error
from bench.report import write_json
from bench.timing import allow_gemm_configs

CUBLAS, TORCH = "cublas", "torch._grouped_mm"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def dense(m: int, n: int, k: int, majors: str = "kk") -> Case:
    """`majors`: of A and of B, k or n."""
    a = random(m, k) if majors[0] == "k" else random(k, m).t()
    b = random(n, k) if majors[1] == "k" else random(k, n).t()
    ours, theirs = (torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    calls = {
        "phalanx": lambda: phalanx.gemm_bf16(a, b, out=ours),
        CUBLAS: lambda: torch.matmul(a, b.t(), out=theirs),
    }
    error = lambda d: relative_error(d[:256], a[:256].float() @ b.float().t())  # noqa: E731
    errors = {"phalanx": lambda: error(ours), CUBLAS: lambda: error(theirs)}
    shape = {"m": m, "n": n, "k": k, "majors": majors}
    return Case("gemm_bf16", shape, 2 * m * n * k, 2 * (m * n + m * k + n * k), calls, errors)


def grouped(groups: int, rows: int, n: int, k: int) -> Case:
    a, b, m = random(groups * rows, k), random(groups, n, k), groups * rows
    offsets = torch.arange(groups + 1, dtype=torch.int32, device="cuda") * rows
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    error = lambda d: relative_error(d[-rows:], a[-rows:].float() @ b[-1].float().t())  # noqa: E731
    calls = {
        "phalanx": lambda: phalanx.grouped_gemm_bf16(a, b, offsets, out=out),
        TORCH: lambda: torch._grouped_mm(a, b.transpose(1, 2), offs=offsets[1:]),
    }
    errors = {"phalanx": lambda: error(out), TORCH: lambda: error(calls[TORCH]())}
    shape = {"groups": groups, "rows": m, "n": n, "k": k}
    return Case("grouped_gemm_bf16", shape, 2 * m * n * k, 2 * (m * n + m * k + groups * n * k), calls, errors)


def gradient(groups: int, tokens: int, m: int, n: int) -> Case:
    a, b, k = random(groups * tokens, m), random(groups * tokens, n), groups * tokens
    offsets = torch.arange(groups + 1, dtype=torch.int32, device="cuda") * tokens
    out = torch.empty(groups, m, n, device="cuda")
    error = lambda d: relative_error(d[-1, :64], a[-tokens:, :64].float().t() @ b[-tokens:].float())  # noqa: E731
    calls = {
        "phalanx": lambda: phalanx.grouped_wgrad_bf16(a, b, offsets, out=out),
        TORCH: lambda: torch._grouped_mm(a.t(), b, offs=offsets[1:]),  # its result is BF16
    }
    errors = {"phalanx": lambda: error(out), TORCH: lambda: error(calls[TORCH]())}
    shape = {"groups": groups, "tokens": k, "m": m, "n": n}
    return Case("grouped_wgrad_bf16", shape, 2 * m * n * k, 2 * k * (m + n) + 4 * groups * m * n, calls, errors)


def cases(ms: tuple[int, ...], more: bool) -> Iterator[Callable[[], Case]]:
    for m in ms:
        for shape in load_shapes(groups=("decode",)):
            yield lambda m=m, shape=shape: dense(m, shape.n, shape.k)
    if more:
        for majors in ("kn", "nk", "nn"):
            yield lambda majors=majors: dense(4096, 4096, 7168, majors)
        for n, k in ((4096, 7168), (7168, 2048)):
            for groups, rows in ((8, 4096), (32, 256), (32, 16)):
                yield lambda n=n, k=k, groups=groups, rows=rows: grouped(groups, rows, n, k)
            yield lambda n=n, k=k: gradient(8, 4096, n, k)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bf16", description=__doc__)
    parser.add_argument("--m", default="4096,64", help="rows of the dense products (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--configs", action="append", default=[], help="PHALANX_GEMM_CONFIG to time too; may be repeated"
    )
    parser.add_argument("--dense-only", action="store_true")
    parser.add_argument("--no-ceilings", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "bf16.json")
    arguments = parser.parse_args(argv)
    machine.require_gpu()
    if arguments.configs:
        allow_gemm_configs()
    log = lambda message: print(f"# {message}", file=sys.stderr, flush=True)  # noqa: E731
    ceilings = {} if arguments.no_ceilings else ceiling_probes.measure(True, log, ("copy", "empty kernel", "read"))
    result = {
        **machine.describe(),
        "ceilings": {name: round(value, 1) for name, value in ceilings.items()},
        "rows": [],
        "summary": {},
    }
    torch.manual_seed(0)
    ms = tuple(int(m) for m in arguments.m.split(",") if m)
    for make in cases(ms, not arguments.dense_only):
        row = measure(make(), arguments.repeats, ceilings, arguments.configs)
        torch.cuda.empty_cache()
        result["rows"].append(row)
        peers = "  ".join(f"{name} {us} ({us / row['median_us']:.3f}x)" for name, us in row["peers"].items())
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        print(
            f"{row['op']:18} {shape:40} {row['median_us']:8.1f} us {row['tflops']:6.1f} TFLOPS {row['gbps']:5.0f} GB/s"
            f"  {peers} {row['failed'] or ''}",
            flush=True,
        )
    for m in ms:
        rows = [row for row in result["rows"] if row["shape"].get("m") == m and row["shape"].get("majors") == "kk"]
        ratios = [row["peers"][CUBLAS] / row["median_us"] for row in rows]
        result["summary"][str(m)] = {"geomean": round(geometric_mean(ratios), 3), "least": round(min(ratios), 3)}
        print(f"M = {m}: {geometric_mean(ratios):.3f}x cuBLAS in the geometric mean, {min(ratios):.3f}x at the least")
    write_json(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
