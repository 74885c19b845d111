"""Quantisation, SwiGLU and their ways back, beside a copy, torch.compile and Triton: python -m bench.quantize

All are bound by memory, so the ceilings are copies: `copy_gbps`, of 2 GiB, and a copy of as many bytes as the operation
must move, in turn with it. Peers are checked against Phalanx first. Results: bench/results/quantize.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import ceilings as ceiling_probes
from bench import machine
from bench.libraries import Phalanx
from bench.report import geomean, write_json
from bench.timing import Call, L2Flush, interleaved, same_copy

SHAPES = ((1, 7168), (64, 7168), (128, 7168), (4096, 7168), (16384, 7168))
SWIGLU_SHAPES = ((1, 2048), (64, 2048), (128, 2048), (8192, 2048), (32768, 2048))
WITH_PEERS = {1, 64, 4096, 8192, 16384, 32768}  # rows
FEW_ROWS = 128
TILES = {"swiglu_backward": (1, 2, 4, 8), "quantize_blocks": (4, 8, 16), "quantize_both": (8, 16)}
TILES["quantize_transposed"] = (64, 128)
DEFAULT_TILES = (1, 4, 8, 16)
E4M3 = torch.float8_e4m3fn

# By name: the bytes that must move, and calls of Phalanx and its peers, each returning its results.
Operations = dict[str, tuple[int, dict[str, Call]]]


# --- what a user writes in torch --------------------------------------------------------------------------------------


def encode(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-37) / 448
    return (x / scale).to(E4M3), scale


def torch_rows(x):
    data, scale = encode(x.float().view(x.shape[0], -1, 128), (2,))
    return data.view(x.shape), scale[:, :, 0].t().contiguous().t()


def torch_blocks(x):
    data, scale = encode(x.float().view(-1, 128, x.shape[1] // 128, 128), (1, 3))
    return data.view(x.shape), scale[:, 0, :, 0]


def torch_transposed(x):
    data, scale = encode(x.float().view(-1, 128, x.shape[1]), (1,))
    return data.view(x.shape).t().contiguous(), scale[:, 0].t()


def torch_both(x):
    return *torch_rows(x), *torch_transposed(x)


def torch_swiglu(x):
    gate, up = x.float().chunk(2, 1)
    return torch_rows(torch.nn.functional.silu(gate) * up)


def torch_swiglu_backward(grad, x):
    gate, up = x.float().chunk(2, 1)
    s, dh = torch.sigmoid(gate), grad.float()
    silu = gate * s
    return (torch.cat([dh * up * (s + silu * (1 - s)), dh * silu], 1).bfloat16(),)


# --- operations -------------------------------------------------------------------------------------------------------


def quantizing(phalanx, m: int, k: int) -> Operations:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    q, q_t = phalanx.quantize_both(x)
    blocks, back = phalanx.quantize(x, (128, 128)), torch.empty_like(x)
    half = 3 * m * k  # BF16 on one side, E4M3 on the other
    operations = {
        "quantize_rows": (half + q.scales.nbytes, {"phalanx": lambda: phalanx.quantize(x, out=q)}),
        "quantize_blocks": (
            half + blocks.scales.nbytes,
            {"phalanx": lambda: phalanx.quantize(x, (128, 128), out=blocks)},
        ),
        "quantize_transposed": (half + q_t.scales.nbytes, {"phalanx": lambda: phalanx.quantize_transposed(x, out=q_t)}),
        "quantize_both": (
            4 * m * k + q.scales.nbytes + q_t.scales.nbytes,
            {"phalanx": lambda: [t for pair in phalanx.quantize_both(x) for t in pair]},
        ),
        "dequantize": (half + q.scales.nbytes, {"phalanx": lambda: phalanx.dequantize(q, out=back)}),
    }
    functions = {
        "quantize_rows": torch_rows,
        "quantize_blocks": torch_blocks,
        "quantize_transposed": torch_transposed,
        "quantize_both": torch_both,
    }
    for name, function in functions.items():
        if m % 128 == 0 or name == "quantize_rows":
            operations[name][1]["torch.compile"] = compiled(function, x)
        results = [torch.empty_like(t) if t.dtype == E4M3 else t.clone() for t in operations[name][1]["phalanx"]()]
        if m % 16 == 0 or name == "quantize_rows":
            operations[name][1]["triton"] = best_triton(name, results, x, *results)
    return operations


def activating(phalanx, m: int, i: int) -> Operations:
    x, grad = (torch.randn(m, n, device="cuda", dtype=torch.bfloat16) for n in (2 * i, i))
    q, grad_x = phalanx.swiglu_quantize(x), torch.empty_like(x)
    out = [torch.empty_like(t) if t.dtype == E4M3 else t.clone() for t in q]
    mine = torch.empty_like(x)
    return {
        "swiglu_quantize": (
            5 * m * i + q.scales.nbytes,
            {
                "phalanx": lambda: phalanx.swiglu_quantize(x, out=q),
                "torch.compile": compiled(torch_swiglu, x),
                "triton": best_triton("swiglu_quantize", out, x, *out),
            },
        ),
        "swiglu_quantize_both": (6 * m * i, {"phalanx": lambda: phalanx.swiglu_quantize_both(x)}),
        "swiglu_backward_both": (10 * m * i, {"phalanx": lambda: phalanx.swiglu_backward_both(grad, x)}),
        "swiglu_backward": (
            10 * m * i,
            {
                "phalanx": lambda: (phalanx.swiglu_backward(grad, x, out=grad_x)[0],),
                "torch.compile": compiled(torch_swiglu_backward, grad, x),
                "triton": best_triton("swiglu_backward", [mine], x, grad, mine),
            },
        ),
    }


def compiled(function: Callable, *arguments: torch.Tensor) -> Call:
    fused = torch.compile(function, dynamic=False)
    return lambda: fused(*arguments)


def best_triton(name: str, results: list[torch.Tensor], *arguments: torch.Tensor) -> Call:
    """With the tile that is quickest here; found at the first call."""
    chosen: list[Call] = []

    def candidate(tile: int) -> Call:
        from bench import triton_quantize

        return lambda: getattr(triton_quantize, name)(*arguments, tile=tile)

    def run() -> list[torch.Tensor]:
        if not chosen:
            calls = {str(tile): candidate(tile) for tile in TILES.get(name, DEFAULT_TILES)}
            times = {tile: sample.median for tile, sample in interleaved(calls, 5).items()}
            chosen.append(calls[min(times, key=times.get)])
        chosen[0]()
        return results

    return run


# --- a run ------------------------------------------------------------------------------------------------------------


def measure(ours: Phalanx, ceilings: dict[str, float], repeats: int, peers: bool = False) -> list[dict]:
    """One row for each operation and shape, in the form of the GEMM's."""
    rows = []
    for make, shapes in ((quantizing, SHAPES), (activating, SWIGLU_SHAPES)):
        for m, k in shapes:
            for op, (num_bytes, calls) in make(ours.module, m, k).items():
                wanted = calls if peers and m in WITH_PEERS else {"phalanx": calls["phalanx"]}
                rows.append(_row(op, m, k, num_bytes, wanted, ceilings, repeats))
            torch.cuda.empty_cache()
    return rows


def _row(op: str, m: int, k: int, num_bytes: int, calls: dict[str, Call], ceilings: dict, repeats: int) -> dict:
    skipped = {}
    for name in [name for name in calls if name != "phalanx"]:
        try:
            if reason := _difference(calls[name](), calls["phalanx"]()):
                raise ValueError(reason)
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {error}"[:200]
            calls = {key: call for key, call in calls.items() if key != name}
    samples = interleaved(calls | {"copy": same_copy(num_bytes)}, repeats, L2Flush())
    times = {name: round(sample.median, 3) for name, sample in samples.items()}
    ours = times.pop("phalanx")
    row = {
        "op": op,
        "shape": {"m": m, "k": k},
        "bytes": num_bytes,
        "median_us": ours,
        "copy_us": times.pop("copy"),
        "peers": times,
        "speedup": {name: round(time / ours, 4) for name, time in times.items()},
        "skipped": skipped,
        "tflops": 0.0,
        "gbps": round(num_bytes / ours * 1e-3, 1),
    }
    row["share_of_same_copy"] = round(row["copy_us"] / ours, 4)
    if "empty_kernel_us" in ceilings:
        row["empty_kernels"] = round(ours / ceilings["empty_kernel_us"], 3)
        if m <= FEW_ROWS:  # as where the kernel before has just written x
            warm = interleaved({"phalanx": calls["phalanx"]}, repeats, lambda: None)["phalanx"].median
            row |= {"l2_us": round(warm, 3), "empty_kernels_l2": round(warm / ceilings["empty_kernel_us"], 3)}
    if "copy_gbps" in ceilings:
        row |= {"bound": "memory", "ceiling": "copy_gbps"}
        row["share_of_ceiling"] = round(row["gbps"] / ceilings["copy_gbps"], 4)
    return row


def _difference(theirs, ours) -> str:
    """What is wrong with a peer's results: codes that differ by more than a step, or values by more than a percent."""
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        if not error < 0.03:
            return f"result {i} differs by {error:.2e}"
    return ""


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        shape = f"{row['shape']['m']}x{row['shape']['k']}"
        parts = [f"{row['op']} {shape}: {row['median_us']:.1f} us, {row['gbps']:.0f} GB/s"]
        if "share_of_ceiling" in row:
            parts.append(
                f"{row['share_of_ceiling']:.0%} of a copy's rate, {row['share_of_same_copy']:.0%} of this copy"
            )
        if "empty_kernels_l2" in row:
            parts.append(f"{row['empty_kernels']:.2f} empty kernels, {row['empty_kernels_l2']:.2f} from L2")
        parts += [f"{name} {time:.1f}" for name, time in row["peers"].items()]
        parts += [f"{name} skipped: {reason}" for name, reason in row["skipped"].items()]
        print(", ".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    machine.require_gpu()
    ceilings = {k: round(v, 3) for k, v in ceiling_probes.measure(True, lambda text: print(f"# {text}")).items()}
    rows = measure(Phalanx(), ceilings, arguments.repeats, not arguments.no_peers)
    speedups: dict[str, list[float]] = {}
    for row in rows:
        for name, speedup in row["speedup"].items():
            speedups.setdefault(name, []).append(speedup)
    summary = {name: round(geomean(values), 3) for name, values in speedups.items()}
    result = machine.describe() | {"ceilings": ceilings, "summary": summary, "rows": rows}
    write_json(result, arguments.out / "quantize.json")
    print_rows(rows)
    print("speedup, geometric mean:", summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
