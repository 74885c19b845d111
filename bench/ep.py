"""Expert parallelism, one process a GPU: dispatch and combine beside NCCL, by number of SMs. See bench/README.md.

    python -m bench.ep --out results.json [--quick]

A call's time is that of the slowest rank, the median over calls. Before each call the L2 is flushed and all ranks meet.
`wire` is the bandwidth of remote bytes alone, each way; `logical` counts every row, as others quote it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bench import machine

HIDDEN, EXPERTS, TOPK = 7168, 256, 8


# --- probes: one process, both GPUs -----------------------------------------------------------------------------------


def probe_links() -> dict[str, dict[int, float]]:
    """GB/s of stores to and loads from a peer, one way at a time, by number of SMs."""
    from bench.device_code import Module

    source = """#include "bench/probe/peer.cuh"
using phalanx::probe::PeerWords;
extern "C" __global__ void __launch_bounds__(1024) peer(const PeerWords* from, PeerWords* to, long long count) {
  phalanx::probe::peer_copy<4>(from, to, count);
}
"""
    num_bytes = 256 << 20
    with torch.cuda.device(0):
        module = Module(source)
        mine = torch.ones(num_bytes, dtype=torch.uint8, device="cuda:0")
        theirs = torch.ones(num_bytes, dtype=torch.uint8, device="cuda:1")
        mine.copy_(theirs), theirs.copy_(mine)  # torch enables peer access
        torch.cuda.synchronize(1)
        result = {"store": {}, "load": {}}
        for name, (source_, target) in {"store": (mine, theirs), "load": (theirs, mine)}.items():
            for sms in (4, 8, 16, 24, 32, 64, 132):
                call = lambda: module.launch("peer", sms, 1024, source_, target, ctypes.c_int64(num_bytes // 16))  # noqa: B023, E731
                call()
                times = []
                for _ in range(5):
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record(), call(), end.record()
                    torch.cuda.synchronize()
                    times.append(start.elapsed_time(end) * 1e-3)
                result[name][sms] = num_bytes / statistics.median(times) * 1e-9
    result["local store"] = probe_local_stores()
    return result


def probe_local_stores() -> dict[int, float]:
    """GB/s of stores to a GPU's own memory by number of SMs: no dispatch can be quicker than its rows are written."""
    from bench.device_code import Module

    source = """#include "bench/probe/peer.cuh"
using phalanx::probe::PeerWords;
extern "C" __global__ void __launch_bounds__(1024) fill(PeerWords* to, long long count) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) to[i] = {1, 2, 3, 4};
}
"""
    module, num_bytes, result = Module(source), 1 << 30, {}
    to = torch.empty(num_bytes, dtype=torch.uint8, device="cuda:0")
    for sms in (8, 16, 24, 32, 64, 132):
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(), module.launch("fill", sms, 1024, to, ctypes.c_int64(num_bytes // 16)), end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        result[sms] = num_bytes / statistics.median(times) * 1e-9
    return result


def probe_flags(rounds: int = 1000) -> float:
    """Nanoseconds until a flag that was stored at a peer has been seen, and the answer too."""
    from bench.device_code import Module

    source = """#include "bench/probe/peer.cuh"
extern "C" __global__ void flags(phalanx::u64* mine, phalanx::u64* theirs, int first, long long rounds) {
  phalanx::probe::flag_round_trips(mine, theirs, first, rounds, mine + 1);
}
"""
    words, modules = [], []
    for device in range(2):
        with torch.cuda.device(device):
            modules.append(Module(source))
            words.append(torch.zeros(2, dtype=torch.int64, device="cuda"))
    for device in range(2):
        torch.cuda.synchronize(device)
    for device in range(2):
        with torch.cuda.device(device):
            mine, theirs = words[device], words[1 - device]
            modules[device].launch("flags", 1, 1, mine, theirs, ctypes.c_int32(device == 0), ctypes.c_int64(rounds))
    for device in range(2):
        torch.cuda.synchronize(device)
    return int(words[0][1]) / rounds


# --- one rank --------------------------------------------------------------------------------------------------------


class Rank:
    """A process's GPU, its inputs, and a clock that all ranks share."""

    def __init__(self, rank: int, size: int, repeats: int):
        self.rank, self.size, self.repeats = rank, size, repeats
        self._flushed = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
        self._meet = torch.zeros(1, device="cuda")
        self.generator = torch.Generator("cuda").manual_seed(1234 + rank)

    def time(self, call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """Microseconds of a call."""
        times = []
        for repeat in range(self.repeats + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if before:
                before()
            self._flushed.zero_()
            torch.cuda._sleep(400_000)  # the host runs ahead
            dist.all_reduce(self._meet)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                times.append(start.elapsed_time(end) * 1e3)
        slowest = torch.tensor(times, device="cuda")
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest.median())

    def back_to_back(self, call: Callable[[], object], count: int = 50) -> float:
        """Microseconds of a call among many, captured in a graph of `count`."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        return self.time(graph.replay) / count

    def problem(self, tokens: int, hot: bool = False):
        x = torch.randn(tokens, HIDDEN, device="cuda", generator=self.generator).bfloat16()
        scores = torch.rand(tokens, EXPERTS, device="cuda", generator=self.generator)
        if hot:
            scores[:, 0] = 2  # one expert that every token chooses
        idx = scores.topk(TOPK).indices
        weights = torch.rand(tokens, TOPK, device="cuda", generator=self.generator)
        return x, idx, weights

    def remote_tokens(self, idx: torch.Tensor) -> int:
        """Pairs of a token and another rank that it goes to."""
        owner = idx // (EXPERTS // self.size)
        return sum(int((owner == r).any(1).sum()) for r in range(self.size) if r != self.rank)


def make_ep(group, tokens: int, **options):
    import phalanx

    return phalanx.ExpertParallel(group, hidden=HIDDEN, num_experts=EXPERTS, topk=TOPK, max_tokens=tokens, **options)


def check(rank: Rank, ep, tokens: int, quantize: bool) -> None:
    """Rows against all ranks' tokens gathered by NCCL, and sums against FP32."""
    import phalanx

    x, idx, weights = rank.problem(tokens)
    everyone = [[torch.empty_like(a) for _ in range(rank.size)] for a in (x, idx, weights)]
    for gathered, mine in zip(everyone, (x, idx, weights), strict=True):
        dist.all_gather(gathered, mine)
    xs, idxs = torch.cat(everyone[0]), torch.cat(everyone[1])
    result = ep.dispatch(x, idx, weights, quantize=quantize)
    first = ep.first_local_expert
    wanted = torch.cat([(idxs == e).any(1).nonzero()[:, 0] for e in range(first, first + ep.num_local_experts)])
    assert int(result.offsets[-1]) == len(wanted)
    if quantize:
        q = phalanx.quantize(xs)
        assert torch.equal(result.rows.data.view(torch.uint8), q.data.view(torch.uint8)[wanted])
        assert torch.equal(result.rows.scales, q.scales[wanted])
        rows = phalanx.dequantize(result.rows, dtype=torch.bfloat16)
    else:
        assert torch.equal(result.rows.view(torch.int16), xs.view(torch.int16)[wanted])
        rows = result.rows
    out = ep.combine(rows, result.handle, tokens=tokens)
    original = phalanx.dequantize(phalanx.quantize(x), dtype=torch.bfloat16) if quantize else x
    exact = original.double() * weights.double().sum(1, keepdim=True)
    error = ((out.double() - exact).norm() / exact.norm()).item()
    assert error < 4e-3, error
    again = ep.combine(rows, result.handle, tokens=tokens)
    assert torch.equal(out.view(torch.int16), again.view(torch.int16))
    torch.cuda.synchronize()
    ep.check()


def throughput(rank: Rank, group, tokens: int, sms: int, hot: bool = False, empty_rank: bool = False) -> list[dict]:
    import phalanx

    mine = 0 if empty_rank and rank.rank == rank.size - 1 else tokens
    x, idx, weights = rank.problem(mine, hot)
    capacity = torch.tensor([rank.size * tokens * TOPK], device="cuda")
    ep = make_ep(group, tokens, dtype="bf16", num_sms=sms)
    rows = []
    remote = rank.remote_tokens(idx)
    everyone = torch.tensor([remote], device="cuda")
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    remote = int(everyone)
    handle = ep.dispatch(x, idx, weights)
    capacity = int(handle.offsets[-1]) + 64
    bf16 = ep.dispatch(x, idx, weights, capacity=capacity)
    q = phalanx.quantize(x)
    fp8 = ep.dispatch(q, idx, weights, capacity=capacity)
    row = {"tokens": tokens, "sms": sms, "hot": hot, "empty_rank": empty_rank, "rows": int(handle.offsets[-1])}

    def add(name: str, us: float, token_bytes: int) -> None:
        wire = remote * token_bytes / us * 1e-3
        logical = tokens * TOPK * token_bytes / us * 1e-3
        rows.append({"op": name, **row, "us": us, "wire_gbps": wire, "logical_gbps": logical})

    fp8_bytes, bf16_bytes = HIDDEN + HIDDEN // 32, 2 * HIDDEN
    add("dispatch e4m3", rank.time(lambda: ep.dispatch(q, idx, weights, capacity=capacity, out=fp8)), fp8_bytes)
    add("dispatch bf16", rank.time(lambda: ep.dispatch(x, idx, weights, capacity=capacity, out=bf16)), bf16_bytes)
    quantizing = lambda: ep.dispatch(x, idx, weights, capacity=capacity, quantize=True, out=fp8)  # noqa: E731
    add("dispatch bf16 as e4m3", rank.time(quantizing), fp8_bytes)
    again = lambda: ep.dispatch(q, handle=fp8.handle, capacity=capacity, out=fp8)  # noqa: E731
    add("dispatch e4m3, handle", rank.time(again), fp8_bytes)
    out = torch.empty_like(x)
    combine = lambda: ep.combine(bf16.rows, bf16.handle, tokens=mine, out=out)  # noqa: E731
    add("combine bf16", rank.time(combine), bf16_bytes)
    ep.check()
    return rows


def latency(rank: Rank, group, tokens: int, sms: int) -> list[dict]:
    x, idx, weights = rank.problem(tokens)
    ep = make_ep(group, tokens, dtype="bf16", latency=True, num_sms=sms)
    capacity = rank.size * tokens * TOPK
    result = ep.dispatch(x, idx, weights, capacity=capacity, quantize=True)
    rows = torch.randn(capacity, HIDDEN, device="cuda").bfloat16()
    out = torch.empty_like(x)
    calls = {
        "latency dispatch": lambda: ep.dispatch(x, idx, weights, capacity=capacity, quantize=True, out=result),
        "latency combine": lambda: ep.combine(rows, result.handle, tokens=tokens, out=out),
    }
    both = lambda: [call() for call in calls.values()]  # noqa: E731
    timed = [
        {"op": name, "tokens": tokens, "sms": sms, "us": rank.time(call), "graph_us": rank.back_to_back(call)}
        for name, call in calls.items()
    ]
    timed.append(
        {"op": "latency both", "tokens": tokens, "sms": sms, "us": rank.time(both), "graph_us": rank.back_to_back(both)}
    )
    ep.check()
    return timed


def nccl(rank: Rank, tokens: int) -> list[dict]:
    """What a user would write with torch: sort by rank, all_to_all_single, expand there; and back."""
    x, idx, _ = rank.problem(tokens)
    per_rank = EXPERTS // rank.size

    def plan():
        owner = idx // per_rank
        goes = torch.stack([(owner == r).any(1) for r in range(rank.size)])
        order = goes.nonzero()[:, 1]
        counts = goes.sum(1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        return order, counts.tolist(), received.tolist()

    def dispatch():
        order, counts, received = plan()
        inbox = torch.empty(sum(received), HIDDEN, dtype=x.dtype, device="cuda")
        experts = torch.empty(sum(received), TOPK, dtype=idx.dtype, device="cuda")
        dist.all_to_all_single(inbox, x[order], received, counts)
        dist.all_to_all_single(experts, idx[order], received, counts)
        local = experts - rank.rank * per_rank
        here = (local >= 0) & (local < per_rank)
        token, choice = here.nonzero(as_tuple=True)
        by_expert = torch.sort(local[token, choice], stable=True).indices
        return inbox[token[by_expert]]

    order, counts, received = plan()
    sums = torch.randn(sum(received), HIDDEN, device="cuda").bfloat16()

    def combine():
        home = torch.empty(sum(counts), HIDDEN, dtype=x.dtype, device="cuda")
        dist.all_to_all_single(home, sums, counts, received)
        return torch.zeros(tokens, HIDDEN, device="cuda").index_add_(0, order, home.float()).bfloat16()

    return [
        {"op": "dispatch bf16", "tokens": tokens, "us": rank.time(dispatch)},
        {"op": "combine bf16 (sums already made)", "tokens": tokens, "us": rank.time(combine)},
    ]


def overlap(rank: Rank, group, trace: Path) -> list[dict]:
    """A product and a dispatch on streams of their own, each on its share of the SMs: alone, and together.

    The dispatch's stream has the higher priority: products that follow each other start early, on any SM that is free.
    Writes a timeline of the last for Perfetto or chrome://tracing.
    """
    import phalanx

    sms, tokens, repeats = 32, 4096, 8
    x, idx, weights = rank.problem(tokens)
    ep = make_ep(group, tokens, num_sms=sms)
    q = phalanx.quantize(x)
    result = ep.dispatch(q, idx, weights)
    capacity = len(result.row_weights)
    w = phalanx.quantize(torch.randn(4096, HIDDEN, device="cuda").bfloat16(), block=(128, 128))
    product = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    rest = torch.cuda.get_device_properties(rank.rank).multi_processor_count - sms
    streams = [torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]

    def multiply():
        for _ in range(repeats):
            phalanx.gemm_fp8(q, w, out=product, num_sms=rest)

    def dispatch():
        for _ in range(repeats):
            ep.dispatch(q, idx, weights, capacity=capacity, out=result)

    def both():
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for stream, work in zip(reversed(streams), (dispatch, multiply), strict=True):
            with torch.cuda.stream(stream):
                work()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    times = {name: rank.time(call) / repeats for name, call in (("product", multiply), ("dispatch", dispatch))}
    times["both"] = rank.time(both) / repeats
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
        dist.barrier()
        both()
        torch.cuda.synchronize()
    if rank.rank == 0:
        profile.export_chrome_trace(str(trace))
        times |= name_kernels(trace, repeats)
    ep.check()
    return [{"op": name, "us": us} for name, us in times.items()]


def name_kernels(trace: Path, repeats: int) -> dict[str, float]:
    """Keeps the last round of both streams in a trace, says which kernel is which; the mean time of each in it."""
    document = json.loads(trace.read_text())
    kernels = [event for event in document["traceEvents"] if event.get("name") == "phalanx_kernel"]
    grids = sorted({event["args"]["grid"][0] for event in kernels})
    names = dict(zip(grids, ("dispatch", "product"), strict=True))  # by their numbers of CTAs
    kept, times = [], {}
    for grid, name in names.items():
        mine = sorted((event for event in kernels if event["args"]["grid"][0] == grid), key=lambda event: event["ts"])
        kept += [event | {"name": name, "tid": name} for event in mine[-repeats:]]
        times[f"{name}, of both"] = statistics.mean(event["dur"] for event in mine[-repeats:])
    trace.write_text(json.dumps({"traceEvents": kept}) + "\n")
    return times


def deep_ep(rank: Rank, tokens: int, sms: int = 32) -> list[dict]:
    """DeepEP within a node, where it is installed. Its rows are not expanded, its sums not weighted."""
    try:
        from deep_ep import Buffer
    except ImportError as error:
        if rank.rank == 0:
            print("deep_ep is not measured:", error)
        return []
    import phalanx

    x, idx, weights = rank.problem(tokens)
    q = phalanx.quantize(x)
    Buffer.set_num_sms(sms)
    buffer = Buffer(dist.group.WORLD, num_nvl_bytes=1 << 30)
    per_rank, per_node, per_expert, is_here, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_node, "is_token_in_rank": is_here}
    routing = {"topk_idx": idx, "topk_weights": weights, "num_tokens_per_expert": per_expert, **layout}
    received, *_, handle, _ = buffer.dispatch(x, **routing)
    calls = {}
    for name, tensor in {"bf16": x, "e4m3": (q.data, q.scales.contiguous())}.items():
        calls[f"dispatch {name}"] = lambda tensor=tensor: buffer.dispatch(tensor, **routing)
        calls[f"dispatch {name}, handle"] = lambda tensor=tensor: buffer.dispatch(tensor, handle=handle)
    calls["combine bf16 (unweighted)"] = lambda: buffer.combine(received, handle)
    return [{"op": name, "tokens": tokens, "sms": sms, "us": rank.time(call)} for name, call in calls.items()]


def soak(rank: Rank, group, rounds: int) -> int:
    """Latency rounds back to back, checked now and then against the first result."""
    tokens = 16
    x, idx, weights = rank.problem(tokens)
    ep = make_ep(group, tokens, dtype="bf16", latency=True)
    capacity = rank.size * tokens * TOPK
    result = ep.dispatch(x, idx, weights, capacity=capacity)
    first = ep.combine(result.rows, result.handle, tokens=tokens)
    out = torch.empty_like(first)

    def round():
        ep.dispatch(x, idx, weights, capacity=capacity, out=result)
        ep.combine(result.rows, result.handle, tokens=tokens, out=out)

    torch.cuda.synchronize()
    graph, per_graph = torch.cuda.CUDAGraph(), 500
    with torch.cuda.graph(graph):
        for _ in range(per_graph):
            round()
    for _ in range(rounds // per_graph):
        out.zero_(), result.rows.zero_()
        graph.replay()
        assert torch.equal(out.view(torch.int16), first.view(torch.int16))
    torch.cuda.synchronize()
    ep.check()
    return rounds


def run_rank(rank: int, size: int, arguments: argparse.Namespace) -> None:
    import phalanx

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    try:
        me = Rank(rank, size, arguments.repeats)
        ids = [phalanx.Group.nccl_id() if rank == 0 else None]
        dist.broadcast_object_list(ids)
        over_nccl = phalanx.Group.nccl(ids[0], rank, size, rank, timeout=5)
        check(me, make_ep(over_nccl, 300, dtype="bf16"), 300, False)
        group = phalanx.Group.from_torch(timeout=5)
        check(me, make_ep(group, 1000, dtype="bf16"), 1000, True)
        check(me, make_ep(group, 128, dtype="bf16", latency=True), 128, True)
        result = {"checked": True, "latency": [], "throughput": []}

        def note(what, rows):
            result.setdefault(what, []).extend(rows)
            if rank == 0:
                for row in rows:
                    print(what, {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")

        for sms in arguments.latency_sms:
            note("latency", latency(me, group, 128, sms))
        for sms in arguments.sms:
            note("throughput", throughput(me, group, 4096, sms))
        if not arguments.quick:
            for sms in (32, 64, 128):
                note("throughput", throughput(me, group, 8192, sms))
            note("throughput", throughput(me, group, 4096, 32, hot=True))
            note("throughput", throughput(me, group, 4096, 32, empty_rank=True))
        note("deep_ep", deep_ep(me, 4096))
        note("overlap", overlap(me, group, Path(arguments.out).with_suffix(".trace.json")))
        note("nccl", nccl(me, 4096) + nccl(me, 128))
        if arguments.soak:
            result["soak_rounds"] = soak(me, group, arguments.soak)
            if rank == 0:
                print("soak", result["soak_rounds"], flush=True)
        if rank == 0:
            result |= machine.describe() | {"gpu": f"{size} x {torch.cuda.get_device_name()}"}
            Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ep", description=__doc__)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--out", default="ep.json")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sms", type=numbers, default=[2, 4, 8, 16, 24, 32])
    parser.add_argument("--latency-sms", type=numbers, default=[64, 128])
    parser.add_argument("--soak", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--port", type=int, default=29511)
    arguments = parser.parse_args()
    machine.require_gpu()
    size = torch.cuda.device_count()
    if size < 2:
        raise SystemExit("expert parallelism is timed between GPUs; there is one")
    torch.multiprocessing.spawn(run_rank, (size, arguments), nprocs=size)
    links = probe_links()
    print("links", links)
    path = Path(arguments.out)
    described = {"round_trip_ns": {"flag": probe_flags()}, "links_gbps": links}
    path.write_text(json.dumps({**json.loads(path.read_text()), **described}, indent=1) + "\n")


if __name__ == "__main__":
    main()
