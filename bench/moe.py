"""Tokens to their experts and back, beside a copy, torch and Triton: python -m bench.moe [--tokens 1,128,4096]

Bytes are those that must move: each token read once, each row written once, and the other way round. Every peer is
checked against Phalanx first. Results: bench/results/moe.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import phalanx
import torch

from bench import ceilings as ceiling_probes
from bench import machine
from bench.report import geomean, write_json
from bench.timing import Call, L2Flush, interleaved, same_copy

HIDDEN, TOPK, EXPERTS = 7168, 8, 32


class Layer:
    """One routing, and the operands of every operation on it."""

    def __init__(self, tokens: int):
        generator = torch.Generator("cuda").manual_seed(tokens)
        self.tokens = tokens
        scores = torch.rand(tokens, EXPERTS, device="cuda", generator=generator)
        self.topk_idx = scores.topk(TOPK).indices
        self.weights = torch.rand(tokens, TOPK, device="cuda", generator=generator)
        self.x = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).bfloat16()
        self.q = phalanx.quantize(self.x)
        self.routing = phalanx.route(self.topk_idx, EXPERTS)
        self.rows = phalanx.permute(self.x, self.routing)
        self.row_q = phalanx.permute(self.q, self.routing)
        self.out, self.grad = torch.empty_like(self.x), torch.randn_like(self.x)
        self.token_of_row = (self.routing.sources // TOPK).long()

    # --- what a user writes in torch ----------------------------------------------------------------------------------

    def torch_route(self) -> tuple[torch.Tensor, ...]:
        experts, order = self.topk_idx.flatten().sort(stable=True)
        ones = torch.ones_like(experts)
        counts = torch.zeros(EXPERTS, dtype=torch.int64, device="cuda").scatter_add_(
            0, experts, ones
        )  # no bincount: it waits
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device="cuda")
        return counts, offsets, slots.view_as(self.topk_idx), order

    def torch_permute_bf16(self) -> torch.Tensor:
        return self.x.index_select(0, self.token_of_row)

    def torch_permute_e4m3(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = self.q.data.view(torch.uint8).index_select(0, self.token_of_row)
        return data, self.q.scales.t().index_select(1, self.token_of_row).t()

    def torch_unpermute(self) -> torch.Tensor:
        out = torch.zeros(self.tokens, HIDDEN, device="cuda")
        weights = self.weights.flatten()[self.routing.sources.long()]
        return out.index_add_(0, self.token_of_row, self.rows * weights[:, None]).bfloat16()

    # --- all of it ----------------------------------------------------------------------------------------------------

    def operations(self) -> dict[str, tuple[int, dict[str, Call]]]:
        """By name: the bytes that must move, and the calls of Phalanx and its peers."""
        from bench import triton_moe

        r, rows, (row_data, row_scales) = self.routing, self.rows, self.row_q
        scales, scale_bytes = self.q.scales, 4 * self.q.scales.shape[1]
        token, q_token, index_bytes = 2 * HIDDEN, HIDDEN + scale_bytes, self.topk_idx.nbytes
        there_and_back = self.tokens * (1 + TOPK)
        route = index_bytes + sum(field.nbytes for field in r[:5])
        return {
            "route": (
                route,
                {"phalanx": lambda: phalanx.route(self.topk_idx, EXPERTS), "torch": self.torch_route},
            ),
            "permute_bf16": (
                there_and_back * token,
                {
                    "phalanx": lambda: phalanx.permute(self.x, r, out=rows),
                    "torch": self.torch_permute_bf16,
                    "triton": lambda: triton_moe.permute(self.x, None, r.sources, rows, None, TOPK),
                },
            ),
            "permute_e4m3": (
                there_and_back * q_token,
                {
                    "phalanx": lambda: phalanx.permute(self.q, r, out=self.row_q),
                    "torch": self.torch_permute_e4m3,
                    "triton": lambda: triton_moe.permute(self.q.data, scales, r.sources, row_data, row_scales, TOPK),
                },
            ),
            "route_and_permute_e4m3": (
                there_and_back * q_token + route,
                {
                    "phalanx": lambda: phalanx.route_and_permute(self.q, self.topk_idx, EXPERTS, out=self.row_q),
                    "torch": lambda: (self.torch_route(), self.torch_permute_e4m3()),
                },
            ),
            "unpermute": (
                there_and_back * token,
                {
                    "phalanx": lambda: phalanx.unpermute(rows, r, self.weights, out=self.out),
                    "torch": self.torch_unpermute,
                    "triton": lambda: triton_moe.unpermute(rows, r.slots, self.weights, self.out),
                },
            ),
            "unpermute_backward": (
                (1 + 2 * TOPK) * self.tokens * token,
                {"phalanx": lambda: phalanx.unpermute_backward(self.grad, r, self.weights, rows)},
            ),
        }

    def check(self) -> None:
        """Torch agrees with Phalanx, and Triton, which writes the same outputs, too."""
        from bench import triton_moe

        r = self.routing
        for ours, theirs in zip((r.counts, r.offsets, r.slots, r.sources), self.torch_route(), strict=True):
            assert torch.equal(ours.long(), theirs), "route"
        assert torch.equal(self.rows, self.torch_permute_bf16()), "permute"
        data, scales = self.torch_permute_e4m3()
        assert torch.equal(self.row_q.data.view(torch.uint8), data) and torch.equal(self.row_q.scales, scales), (
            "permute"
        )
        ours = phalanx.unpermute(self.rows, r, self.weights).float()
        assert (ours - self.torch_unpermute().float()).abs().max() < 0.1, "unpermute"
        out = torch.full_like(self.out, torch.nan)
        triton_moe.unpermute(self.rows, r.slots, self.weights, out)
        assert (ours - out.float()).abs().max() < 0.1, "unpermute in Triton"
        rows = torch.full_like(self.rows, torch.nan)
        triton_moe.permute(self.x, None, r.sources, rows, None, TOPK)
        assert torch.equal(rows, self.rows), "permute in Triton"
        other = torch.zeros_like(data), torch.empty_like(self.row_q.scales).fill_(torch.nan)
        triton_moe.permute(self.q.data, self.q.scales, r.sources, *other, TOPK)
        assert torch.equal(other[0], data) and torch.equal(other[1], scales), "permute of E4M3 in Triton"


def measure(tokens: tuple[int, ...], repeats: int, log: Callable[[str], None]) -> dict:
    ceilings = ceiling_probes.measure(True, log, ("copy", "empty kernel"))
    rows = []
    for count in tokens:
        layer = Layer(count)
        layer.check()
        for op, (num_bytes, calls) in layer.operations().items():
            copy = same_copy(num_bytes)
            samples = interleaved(calls | {"copy": copy}, repeats, L2Flush())
            ours, same = samples["phalanx"].median, samples.pop("copy").median
            row = {"op": op, "shape": {"tokens": count, "hidden": HIDDEN, "topk": TOPK, "experts": EXPERTS}}
            row |= {"bytes": num_bytes, "median_us": round(ours, 3), "gbps": round(num_bytes / ours * 1e-3, 1)}
            row["peers"] = {name: round(s.median, 3) for name, s in samples.items() if name != "phalanx"}
            row["share_of_copy"] = round(row["gbps"] / ceilings["copy_gbps"], 4)
            row |= {"copy_us": round(same, 3), "share_of_same_copy": round(same / ours, 4)}
            row["empty_kernels"] = round(ours / ceilings["empty_kernel_us"], 3)
            rows.append(row)
            peers = "".join(f", {name} {time:.1f} ({time / ours:.2f}x)" for name, time in row["peers"].items())
            log(
                f"{op} {count}: {ours:.1f} us, {row['gbps']:.0f} GB/s, {row['share_of_copy']:.1%} of a copy's rate, "
                f"{row['share_of_same_copy']:.0%} of this copy, "
                f"{row['empty_kernels']:.2f} empty kernels{peers}"
            )
    summary = {name: _speedup(rows, name) for name in ("torch", "triton")}
    return machine.describe() | {"ceilings": ceilings, "summary": summary, "rows": rows}


def _speedup(rows: list[dict], name: str) -> float:
    return round(geomean([row["peers"][name] / row["median_us"] for row in rows if name in row["peers"]]), 3)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.moe", description=__doc__)
    parser.add_argument("--tokens", default="1,16,128,4096,16384", help="numbers of tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args()
    machine.require_gpu()
    tokens = tuple(int(part) for part in arguments.tokens.split(","))
    result = measure(tokens, arguments.repeats, lambda line: print(line, flush=True))
    print(", ".join(f"{name} {value:.5g}" for name, value in result["ceilings"].items()))
    print("speedup, geometric mean:", result["summary"])
    write_json(result, arguments.out / "moe.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
