"""Grouped products and weight gradients beside DeepGEMM: python -m bench.grouped [--only ragged,masked]

--only swiglu takes products of gates and ups with SwiGLU in their epilogue beside the two kernels, 1 to 8192 tokens
over 32 experts, all of them here.

Experts are those of DeepSeek-V3, (N, K) = (4096, 7168) and (7168, 2048), unless --experts says otherwise; --only sweep
takes three models' experts and 1 to 8192 tokens on each of eight ranks, routed at random. FLOPs and bytes count the
rows that groups really have: a library that pads does so at its own cost. Results: bench/results/grouped.json.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import phalanx
import torch

from bench import ceilings as ceiling_probes
from bench import machine
from bench.libraries import MAX_ERROR, DeepGemm
from bench.report import write_json
from bench.timing import Call, L2Flush, allow_gemm_configs, interleaved, with_gemm_config

EXPERTS = ((4096, 7168), (7168, 2048))
MODELS = {  # experts, then (N, K) of gate and up together and of down
    "deepseek-v3": (256, EXPERTS),
    "qwen3-235b": (128, ((3072, 4096), (4096, 1536))),
    "qwen3-30b": (128, ((1536, 2048), (2048, 768))),
}
RANKS, TOP_K = 8, 8
SWIGLU_EXPERTS = 32
SAMPLED_ROWS = 64
ALIGNMENT = 128  # of a group's rows in DeepGEMM's contiguous layout


def operand(shape: tuple[int, ...], block: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random E4M3 [rows, cols] or a stack, with its scales."""
    generator = torch.Generator("cuda").manual_seed(seed)
    pairs = [
        phalanx.quantize(torch.randn(shape[-2:], device="cuda", generator=generator, dtype=torch.bfloat16), block)
        for _ in range(math.prod(shape[:-2]))
    ]
    if len(shape) == 2:
        return pairs[0]
    scales = torch.stack([pair.scales.t() for pair in pairs]) if block[0] == 1 else None
    stacked = scales.swapaxes(1, 2) if block[0] == 1 else torch.stack([pair.scales for pair in pairs])
    return torch.stack([pair.data.view(torch.uint8) for pair in pairs]).view(torch.float8_e4m3fn), stacked


@lru_cache(maxsize=1)
def weights(groups: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return operand((groups, n, k), (128, 128), 2)


def dequantized(data: torch.Tensor, scales: torch.Tensor, block_rows: int) -> torch.Tensor:
    wide = scales.repeat_interleave(128, 1)[:, : data.shape[1]]
    return data.float() * (wide if block_rows == 1 else wide.repeat_interleave(128, 0)[: data.shape[0]])


@dataclass
class Case:
    """One row of the table: calls by library, each with its output to check."""

    op: str
    shape: dict
    flops: int
    num_bytes: int
    calls: dict[str, Call]
    errors: dict[str, Callable[[], float]]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def error_of_rows(a, b, d, rows: list[tuple[int, int, int]]) -> float:
    """Of some (row of A, group, row of D)."""
    at, group, to = (list(x) for x in zip(*rows, strict=True))
    x = dequantized(a[0][at], a[1][at], 1)
    expected = torch.stack([x[i] @ dequantized(b[0][g], b[1][g], 128).t() for i, g in enumerate(group)])
    return relative_error(d[to], expected)


def sample(sizes: list[int]) -> list[tuple[int, int]]:
    """(group, row in the group): the first and last of some groups."""
    full = [g for g, size in enumerate(sizes) if size]
    some = full[:: max(1, len(full) // 3)][:4]
    return [(g, row) for g in some for row in {0, sizes[g] // 2, sizes[g] - 1}]


def contiguous(sizes: list[int], n: int, k: int, deep_gemm, op: str) -> Case:
    rows, groups = sum(sizes), len(sizes)
    a, b = operand((rows, k), (1, 128), 1), weights(groups, n, k)
    starts = [sum(sizes[:g]) for g in range(groups)]
    offsets = torch.tensor([*starts, rows], dtype=torch.int32, device="cuda")
    d = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    calls = {"phalanx": lambda: phalanx.grouped_gemm_fp8(a, b, offsets, out=d)}
    picked = sample(sizes)
    own = [(starts[g] + row, g, starts[g] + row) for g, row in picked]
    errors = {"phalanx": lambda: error_of_rows(a, b, d, own)}
    if deep_gemm:
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        begins, total = [sum(padded[:g]) for g in range(groups)], sum(padded)
        index = torch.repeat_interleave(
            torch.arange(groups, dtype=torch.int32, device="cuda"), torch.tensor(padded, device="cuda")
        )
        place = torch.cat([torch.arange(s, device="cuda") + begin for s, begin in zip(sizes, begins, strict=True)])
        data = torch.zeros(total, k, device="cuda", dtype=torch.uint8)
        data[place] = a[0].view(torch.uint8)
        scales = torch.ones(k // 128, total, device="cuda")
        scales[:, place] = a[1].t()
        peer_a, peer_d = (
            (data.view(torch.float8_e4m3fn), scales.t()),
            torch.empty(total, n, device="cuda", dtype=torch.bfloat16),
        )
        calls["deep_gemm"] = lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(peer_a, b, peer_d, index)
        theirs = [(starts[g] + row, g, begins[g] + row) for g, row in picked]
        errors["deep_gemm"] = lambda: error_of_rows(a, b, peer_d, theirs)
    used = sum(1 for size in sizes if size)
    num_bytes = rows * (k + 4 * (k // 128)) + used * n * k + 2 * rows * n
    shape = {"groups": groups, "rows": rows, "n": n, "k": k}
    return Case(op, shape, 2 * rows * n * k, num_bytes, calls, errors)


def swiglu(tokens: int, n: int, k: int, op: str) -> Case:
    """Gates and ups, SwiGLU and quantisation: in one kernel, in two, and as the planner has it with room for either."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, SWIGLU_EXPERTS, generator=generator).topk(TOP_K).indices
    sizes = torch.bincount(chosen.flatten(), minlength=SWIGLU_EXPERTS)
    rows = tokens * TOP_K
    a, b = operand((rows, k), (1, 128), 1), weights(SWIGLU_EXPERTS, n, k)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int().cuda()
    d = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    one, two, planned = (phalanx.swiglu_quantize(d.zero_()) for _ in range(3))
    calls = {
        "phalanx": lambda: phalanx.grouped_gemm_fp8_swiglu(a, b, offsets, out=one),
        "two_kernels": lambda: phalanx.swiglu_quantize(phalanx.grouped_gemm_fp8(a, b, offsets, out=d), out=two),
        "planned": lambda: phalanx.grouped_gemm_fp8_swiglu(a, b, offsets, out=planned, gates_and_ups=d),
        "product_alone": lambda: phalanx.grouped_gemm_fp8(a, b, offsets, out=d),
    }

    def difference(q: phalanx.Quantized) -> float:
        """0 if all bytes are those of the two kernels."""
        calls["two_kernels"]()
        same = torch.equal(q.data.view(torch.uint8), two.data.view(torch.uint8)) and torch.equal(q.scales, two.scales)
        return 0.0 if same else math.inf

    starts = offsets.tolist()
    own = [(starts[g] + row, g, starts[g] + row) for g, row in sample(sizes.tolist())]
    error_of_product = partial(error_of_rows, a, b, d, own)
    errors = {"phalanx": partial(difference, one), "planned": partial(difference, planned)}
    errors |= {"two_kernels": error_of_product, "product_alone": error_of_product}
    num_bytes = rows * (k + 4 * (k // 128)) + int((sizes > 0).sum()) * n * k + rows * n // 2
    shape = {"groups": SWIGLU_EXPERTS, "rows": rows, "n": n, "k": k}
    return Case(op, shape, 2 * rows * n * k, num_bytes, calls, errors)


def uneven(groups: int, expected: int) -> list[int]:
    generator = torch.Generator().manual_seed(groups)
    return [int(expected * (0.7 + 0.6 * x)) for x in torch.rand(groups, generator=generator).tolist()]


def masked(counts: list[int], expected: int, n: int, k: int, deep_gemm, op: str) -> Case:
    groups, max_rows = len(counts), max(256, -(-max(*counts, expected * 2) // 128) * 128)
    a, b = operand((groups, max_rows, k), (1, 128), 1), weights(groups, n, k)
    on_device = torch.tensor(counts, dtype=torch.int32, device="cuda")
    outs = {name: torch.empty(groups, max_rows, n, device="cuda", dtype=torch.bfloat16) for name in ("ours", "theirs")}
    calls = {
        "phalanx": lambda: phalanx.grouped_gemm_fp8_masked(a, b, on_device, out=outs["ours"], expected_rows=expected)
    }
    rows = [(g * max_rows + row, g, g * max_rows + row) for g, row in sample(counts)]

    def error(d: torch.Tensor) -> float:
        flat = a[0].view(-1, k), a[1].reshape(-1, a[1].shape[2])
        return error_of_rows(flat, b, d.view(-1, n), rows)

    errors = {"phalanx": lambda: error(outs["ours"])}
    if deep_gemm:
        calls["deep_gemm"] = lambda: deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, outs["theirs"], on_device, expected)
        errors["deep_gemm"] = lambda: error(outs["theirs"])
    total = sum(counts)
    used = sum(1 for count in counts if count)
    num_bytes = total * (k + 4 * (k // 128)) + used * n * k + 2 * total * n
    shape = {"groups": groups, "rows": total, "expected": expected, "n": n, "k": k}
    return Case(op, shape, 2 * total * n * k, num_bytes, calls, errors)


def gradient(sizes: list[int], m: int, n: int, deep_gemm) -> Case:
    """D[g] += A · Bᵀ over each group's columns; with one group, wgrad_fp8."""
    k, groups = sum(sizes), len(sizes)
    a, b = operand((m, k), (1, 128), 1), operand((n, k), (1, 128), 2)
    starts = [sum(sizes[:g]) for g in range(groups)]
    offsets = torch.tensor([*starts, k], dtype=torch.int32, device="cuda")
    stack = (groups,) if groups > 1 else ()
    outs = {name: torch.zeros(*stack, m, n, device="cuda") for name in ("ours", "theirs")}

    def ours() -> None:
        if groups > 1:
            phalanx.grouped_wgrad_fp8(a, b, offsets, out=outs["ours"], accumulate=True)
        else:
            phalanx.wgrad_fp8(a, b, out=outs["ours"], accumulate=True)

    def error(name: str) -> float:
        g, some = groups - 1, slice(0, SAMPLED_ROWS)
        columns = slice(starts[g], starts[g] + sizes[g])
        blocks = slice(starts[g] // 128, -(-(starts[g] + sizes[g]) // 128))
        x = dequantized(a[0][some, columns], a[1][some, blocks], 1)
        expected = x @ dequantized(b[0][:, columns], b[1][:, blocks], 1).t()
        d = outs[name][g] if groups > 1 else outs[name]
        return relative_error(d[some], expected)

    calls, errors = {"phalanx": ours}, {"phalanx": lambda: error("ours")}
    if deep_gemm and groups > 1:
        flat = [
            torch.cat(
                [x[0][:, s : s + size].flatten().view(torch.uint8) for s, size in zip(starts, sizes, strict=True)]
            )
            for x in (a, b)
        ]
        peer = [(data.view(torch.float8_e4m3fn), x[1]) for data, x in zip(flat, (a, b), strict=True)]
        tokens = torch.tensor(sizes, dtype=torch.int32, device="cuda")
        d = outs["theirs"]
        calls["deep_gemm"] = lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(*peer, d, sizes, tokens, d)
        errors["deep_gemm"] = lambda: error("theirs")
    elif deep_gemm:
        d = outs["theirs"]
        calls["deep_gemm"] = lambda: deep_gemm.fp8_gemm_nt(a, b, d, c=d, recipe=(1, 1, 128))
        errors["deep_gemm"] = lambda: error("theirs")
    num_bytes = (m + n) * (k + 4 * (k // 128)) + 8 * groups * m * n
    shape = {"groups": groups, "tokens": k, "m": m, "n": n}
    return Case("wgrad" if groups == 1 else "grouped_wgrad", shape, 2 * m * n * k, num_bytes, calls, errors)


def routed(tokens: int, experts: int) -> list[int]:
    """Rows of each expert of the first rank, when `tokens` on each rank choose at random."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens * RANKS, experts, generator=generator).topk(TOP_K).indices
    return torch.bincount(chosen.flatten(), minlength=experts)[: experts // RANKS].tolist()


def sweep(model: str, deep_gemm):
    """Rows in one piece for every number of tokens; few tokens in places of their own, too."""
    experts, shapes = MODELS[model]
    for n, k in shapes:
        for tokens in (1, 16, 128, 1024, 8192):
            yield partial(contiguous, routed(tokens, experts), n, k, deep_gemm, f"{model}_{tokens}")
        for tokens in (1, 16, 128):
            expected = -(-tokens * RANKS * TOP_K // experts)
            yield partial(masked, routed(tokens, experts), expected, n, k, deep_gemm, f"{model}_masked_{tokens}")


def cases(kinds: tuple[str, ...], experts: tuple[tuple[int, int], ...], deep_gemm):
    for n, k in experts:
        if "contiguous" in kinds:
            for groups, rows in ((8, 4096), (4, 8192), (32, 256)):
                yield partial(contiguous, [rows] * groups, n, k, deep_gemm, "contiguous")
        if "ragged" in kinds:
            for tokens in (512, 2048, 8192):
                yield partial(contiguous, routed(tokens, 256), n, k, deep_gemm, f"ragged_{tokens}")
        if "masked" in kinds:
            for groups, expected in ((1, 1024), (2, 512), (4, 256), (32, 128), (32, 16)):
                yield partial(masked, uneven(groups, expected), expected, n, k, deep_gemm, "masked")
        if "wgrad" in kinds:
            for groups, tokens in ((4, 8192), (8, 4096)):
                yield partial(gradient, [tokens] * groups, n, k, deep_gemm)
            for tokens in (4096, 8192):
                yield partial(gradient, [tokens], n, k, deep_gemm)
    if "swiglu" in kinds:
        for model, (_, ((n, k), _)) in MODELS.items():
            for tokens in (1, 16, 64, 512, 2048, 8192):
                yield partial(swiglu, tokens, n, k, f"swiglu_{model}_{tokens}")
    for model in MODELS:
        if "sweep" in kinds or model in kinds:
            yield from sweep(model, deep_gemm)


def measure(case: Case, repeats: int, ceilings: dict, configs: list[str]) -> dict:
    failed, timed = {}, {}
    for name, call in case.calls.items():
        try:
            call()
            torch.cuda.synchronize()
            error = case.errors[name]()
            if not error < MAX_ERROR:
                raise RuntimeError(f"relative error {error:.1e}")
            timed[name] = call
        except Exception as reason:
            failed[name] = f"{type(reason).__name__}: {reason}"[:200]
    for config in configs:
        timed[config] = with_gemm_config(config, case.calls["phalanx"])
        try:
            timed[config]()
            torch.cuda.synchronize()
        except Exception as reason:
            failed[config] = str(reason)[:200]
            del timed[config]
    if "phalanx" not in timed:
        raise RuntimeError(f"{case.op} {case.shape}: {failed}")
    if configs:
        timed["phalanx"] = with_gemm_config("", timed["phalanx"])
    samples = interleaved(timed, repeats, L2Flush())
    median = samples["phalanx"].median
    return {
        "op": case.op,
        "shape": case.shape,
        "median_us": round(median, 2),
        "peers": {name: round(s.median, 2) for name, s in samples.items() if name != "phalanx"},
        "failed": failed,
        "tflops": round(case.flops / median / 1e6, 1),
        "gbps": round(case.num_bytes / median / 1e3, 1),
        "of_read": round(case.num_bytes / median / 1e3 / ceilings["read_gbps"], 3) if "read_gbps" in ceilings else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.grouped", description=__doc__)
    parser.add_argument(
        "--only",
        default="contiguous,ragged,masked,swiglu,wgrad,sweep",
        help="kinds, or models of the sweep (default %(default)s)",
    )
    parser.add_argument("--experts", default="", help="NxK,NxK instead of DeepSeek-V3's")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--configs", action="append", default=[], help="PHALANX_GEMM_CONFIG to time too; may be repeated"
    )
    parser.add_argument("--no-ceilings", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "grouped.json")
    arguments = parser.parse_args(argv)
    machine.require_gpu()
    if arguments.configs:
        allow_gemm_configs()
    experts = tuple(tuple(int(x) for x in text.split("x")) for text in arguments.experts.split(",") if text) or EXPERTS
    log = lambda message: print(f"# {message}", file=sys.stderr, flush=True)  # noqa: E731
    ceilings = {} if arguments.no_ceilings else ceiling_probes.measure(True, log)
    try:
        deep_gemm = DeepGemm().module
    except Exception as reason:
        log(f"deep_gemm is not here: {reason}")
        deep_gemm = None
    result = {
        **machine.describe(),
        "ceilings": {name: round(value, 1) for name, value in ceilings.items()},
        "rows": [],
    }
    for make in cases(tuple(arguments.only.split(",")), experts, deep_gemm):
        row = measure(make(), arguments.repeats, ceilings, arguments.configs)
        torch.cuda.empty_cache()
        result["rows"].append(row)
        write_json(result, arguments.out)
        peers = "  ".join(f"{name} {us} ({us / row['median_us']:.3f}x)" for name, us in row["peers"].items())
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        print(
            f"{row['op']:22} {shape:48} {row['median_us']:9.1f} us {row['tflops']:7.1f} TFLOPS {row['gbps']:7.0f} GB/s"
            f" {row['of_read'] or 0:.2f}  {peers} {row['failed'] or ''}",
            flush=True,
        )
    for peer in ("deep_gemm", "two_kernels"):
        by_op: dict[str, list[float]] = {}
        for row in result["rows"]:
            if peer in row["peers"]:
                kind = re.sub(r"_\d+$", "", row["op"])  # without the number of tokens
                by_op.setdefault(kind, []).append(row["peers"][peer] / row["median_us"])
        for op, ratios in by_op.items():
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{op:22} {mean:.3f}x {peer} in the geometric mean, {min(ratios):.3f}x at the least")
    return 0


if __name__ == "__main__":
    sys.exit(main())
