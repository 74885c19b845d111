"""A layer of experts, forward, beside a chain of DeepGEMM and Triton kernels: python -m bench.mlp

32 experts, top-8, hidden 7168, intermediate 2048; each side in a CUDA graph, cold L2. The chain is told what its
kernels need of the routing: it permutes, but does not route. Results: bench/results/mlp.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import phalanx
import torch
from phalanx.nn import ExpertMLP

from bench import machine
from bench.host import call_time
from bench.libraries import DeepGemm
from bench.report import write_json
from bench.timing import Call, Captured, L2Flush, interleaved

EXPERTS, TOPK, HIDDEN, INTERMEDIATE = 32, 8, 7168, 2048
ALIGNMENT = 128  # of DeepGEMM's groups
QUEUED = 60  # layers whose launches fit in the queue
MANY_TOKENS = 512  # from here on groups lie one behind the other; below, each has rows for all tokens
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


def chain(mlp: ExpertMLP, x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor) -> Call:
    """The layer as one puts it together from DeepGEMM and Triton."""
    from bench import triton_moe, triton_quantize

    deep_gemm = DeepGemm().module
    gate_up, down = mlp.quantized_weights()[0:2], mlp.quantized_weights()[2:4]
    tokens, masked = len(x), len(x) < MANY_TOKENS
    if masked:
        routing = phalanx.route(topk_idx, EXPERTS, max_rows=ALIGNMENT)
        shape, expected = (EXPERTS, ALIGNMENT), tokens * TOPK // EXPERTS
    else:
        routing = phalanx.route(topk_idx, EXPERTS, alignment=ALIGNMENT)
        shape = (int(routing.offsets[-1]),)
        taken = routing.offsets.diff()
        index = torch.repeat_interleave(torch.arange(EXPERTS, dtype=torch.int32, device="cuda"), taken)
    sources = routing.sources[: shape[0]] if not masked else routing.sources

    def empty(cols: int, dtype: torch.dtype, leading: tuple[int, ...] = shape) -> torch.Tensor:
        return torch.empty(*leading, cols, dtype=dtype, device="cuda")

    def scales(cols: int, leading: tuple[int, ...] = shape) -> torch.Tensor:
        return torch.ones(*leading[:-1], cols // 128, leading[-1], device="cuda").transpose(-1, -2)

    q, q_scales = empty(HIDDEN, E4M3, (tokens,)), scales(HIDDEN, (tokens,))
    rows, row_scales = empty(HIDDEN, E4M3), scales(HIDDEN)
    gates, act, act_scales = empty(2 * INTERMEDIATE, BF16), empty(INTERMEDIATE, E4M3), scales(INTERMEDIATE)
    out_rows, out = empty(HIDDEN, BF16), torch.empty_like(x)

    def product(a: tuple, b: tuple, d: torch.Tensor) -> None:
        if masked:
            deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, d, routing.counts, expected)
        else:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, index)

    def run() -> torch.Tensor:
        triton_quantize.quantize_rows(x, q, q_scales)
        triton_moe.permute(q, q_scales, sources, rows, row_scales, TOPK)
        product((rows, row_scales), gate_up, gates)
        triton_quantize.swiglu_quantize(gates, act, act_scales, counts=routing.counts if masked else None)
        product((act, act_scales), down, out_rows)
        triton_moe.unpermute(out_rows, routing.slots, weights, out)
        return out

    return run


def host_us(call: Call, calls: int = 50) -> float:
    """Of a call that finds the GPU idle; `host.call_time` is of one that finds it busy."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return sorted(times)[calls // 2] * 1e6


def measure(tokens: int, mlp: ExpertMLP, repeats: int) -> dict:
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).to(BF16)
    topk_idx = torch.rand(tokens, EXPERTS, device="cuda", generator=generator).topk(TOPK).indices
    weights = torch.rand(tokens, TOPK, device="cuda", generator=generator)
    ours = lambda: mlp(x, topk_idx, weights)  # noqa: E731
    row: dict = {"op": "expert_mlp", "shape": {"tokens": tokens}, "peers": {}}
    row |= {
        "host_us": round(call_time(ours, torch.cuda.synchronize, QUEUED), 1),
        "host_us_idle": round(host_us(ours), 1),
    }
    calls: dict[str, Call] = {"phalanx": Captured([ours])}
    try:
        theirs = chain(mlp, x, topk_idx, weights)
        difference = float((theirs().float() - ours().float()).norm() / ours().float().norm())
        if not difference < 0.06:
            raise ValueError(f"the chain's result differs by {difference:.1e}")
        calls["chain"] = Captured([theirs])
    except Exception as error:
        row["skipped"] = f"{type(error).__name__}: {error}"[:300]
    times = {name: round(sample.median, 1) for name, sample in interleaved(calls, repeats, L2Flush()).items()}
    row["median_us"] = times.pop("phalanx")
    flops = 2 * tokens * TOPK * 3 * HIDDEN * INTERMEDIATE
    row |= {"peers": times, "tflops": round(flops / row["median_us"] * 1e-6, 1)}
    row["speedup"] = {name: round(time / row["median_us"], 3) for name, time in times.items()}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mlp", description=__doc__)
    parser.add_argument("--tokens", default="64,4096")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    machine.require_gpu()
    torch.manual_seed(0)
    mlp = ExpertMLP(EXPERTS, HIDDEN, INTERMEDIATE, device="cuda").requires_grad_(False)
    rows = [measure(int(tokens), mlp, arguments.repeats) for tokens in arguments.tokens.split(",")]
    write_json(machine.describe() | {"rows": rows}, arguments.out / "mlp.json")
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
