"""Expert parallelism: problems for all ranks at once, what must come out, and ranks as threads.

Weights have 8 significant bits, as BF16 has, so that FP64 reproduces every FP32 step of combine exactly.
"""

import functools
import threading
from dataclasses import dataclass

import numpy as np
import phalanx
import torch


@dataclass
class Config:
    num_ranks: int
    hidden: int
    num_experts: int
    topk: int
    max_tokens: int
    alignment: int = 1
    experts_per_rank: list[int] | None = None

    def first_experts(self) -> list[int]:
        even, rest = divmod(self.num_experts, self.num_ranks)
        counts = self.experts_per_rank or [even + (r < rest) for r in range(self.num_ranks)]
        return [0, *np.cumsum(counts).tolist()]

    def make(self, group: phalanx.Group, **options) -> phalanx.ExpertParallel:
        return phalanx.ExpertParallel(
            group,
            hidden=self.hidden,
            num_experts=self.num_experts,
            topk=self.topk,
            max_tokens=self.max_tokens,
            alignment=self.alignment,
            experts_per_rank=self.experts_per_rank,
            **options,
        )


@dataclass
class Problem:
    """What each rank has: lists over ranks, on the CPU."""

    config: Config
    x: list[torch.Tensor]
    topk_idx: list[torch.Tensor]
    topk_weights: list[torch.Tensor]


@dataclass
class Rows:
    """What a rank must get: -1 in source is padding."""

    source: np.ndarray
    token: np.ndarray
    choice: np.ndarray
    offsets: list[int]
    counts: list[int]


def random_problem(
    config: Config, rng: np.random.Generator, tokens: list[int] | None = None, hot: float = 0
) -> Problem:
    x, idx, weights = [], [], []
    for r in range(config.num_ranks):
        t = tokens[r] if tokens else int(rng.choice([0, config.max_tokens, rng.integers(config.max_tokens + 1)]))
        x.append(torch.from_numpy(rng.standard_normal((t, config.hidden), dtype=np.float32)).bfloat16())
        choice = rng.integers(0, config.num_experts, (t, config.topk))
        choice[rng.random(choice.shape) < hot] = 0
        choice[rng.random(choice.shape) < 0.1] = -1
        idx.append(torch.from_numpy(choice).to(torch.int32 if r % 2 else torch.int64))
        weights.append(torch.from_numpy(rng.random((t, config.topk), dtype=np.float32)).bfloat16().float())
    return Problem(config, x, idx, weights)


def expected_rows(problem: Problem, rank: int) -> Rows:
    config, first = problem.config, problem.config.first_experts()
    source, token, choice, offsets, counts = [], [], [], [0], []
    for e in range(first[rank], first[rank + 1]):
        found = [(s, t, k) for s, idx in enumerate(problem.topk_idx) for t, k in np.argwhere(idx.numpy() == e)]
        counts.append(len(found))
        found += [(-1, -1, -1)] * (-len(found) % config.alignment)
        offsets.append(offsets[-1] + len(found))
        for s, t, k in found:
            source.append(s), token.append(t), choice.append(k)
    return Rows(np.array(source, int), np.array(token, int), np.array(choice, int), offsets, counts)


def check_rows(problem: Problem, rank: int, result: phalanx.Dispatched) -> Rows:
    """Every byte of the rows, offsets, counts and weights; returns the rows."""
    rows = expected_rows(problem, rank)
    assert result.offsets.tolist() == rows.offsets
    assert result.counts.tolist() == rows.counts
    n = rows.offsets[-1]
    real = torch.from_numpy(rows.source >= 0)
    origins = [(s, t, k) for s, t, k in zip(rows.source, rows.token, rows.choice, strict=True) if s >= 0]
    weights = torch.zeros(n)
    weights[real] = torch.tensor([float(problem.topk_weights[s][t, k]) for s, t, k in origins])
    assert torch.equal(result.row_weights[:n].cpu(), weights)
    if not isinstance(result.rows, tuple):
        wanted = torch.zeros(n, problem.config.hidden, dtype=torch.bfloat16)
        if real.any():
            wanted[real] = torch.stack([problem.x[s][t] for s, t, _ in origins])
        assert torch.equal(result.rows[:n].cpu().view(torch.int16), wanted.view(torch.int16))
        return rows
    quantized = [phalanx.quantize(x) for x in problem.x]
    data = torch.zeros(n, problem.config.hidden, dtype=torch.uint8)
    scales = torch.ones(n, -(-problem.config.hidden // 128))
    if real.any():
        data[real] = torch.stack([quantized[s].data[t].view(torch.uint8) for s, t, _ in origins])
        scales[real] = torch.stack([quantized[s].scales[t] for s, t, _ in origins])
    assert torch.equal(result.rows.data[:n].cpu().contiguous().view(torch.uint8), data)
    assert torch.equal(result.rows.scales[:n].cpu(), scales)
    return rows


def expected_sums(
    problem: Problem, rank: int, rows: list[Rows], values: list[torch.Tensor], residual=None, weighted=True
) -> torch.Tensor:
    """Combine's result, step by step: FMA in FP32 on each rank; then its own, and others' in BF16 in order of ranks."""
    config = problem.config
    t = len(problem.x[rank])
    total = np.zeros((t, config.hidden), np.float32)
    for r, theirs in sorted(enumerate(rows), key=lambda item: item[0] != rank):
        sums = np.zeros((t, config.hidden), np.float32)
        here = np.zeros(t, bool)
        mine = np.flatnonzero(theirs.source == rank)
        for k in range(config.topk):
            at = mine[theirs.choice[mine] == k]
            tokens = theirs.token[at]
            weight = problem.topk_weights[rank].numpy()[tokens, k][:, None] if weighted else 1.0
            row = values[r][torch.from_numpy(at)].double().numpy()
            sums[tokens] = (weight * row + sums[tokens].astype(np.float64)).astype(np.float32)
            here[tokens] = True
        if r != rank:
            sums = torch.from_numpy(sums).bfloat16().float().numpy()
        total[here] += sums[here]
    if residual is not None:
        total += residual.float().numpy()
    return torch.from_numpy(total).bfloat16()


@functools.cache
def stream_of(rank: int, device: torch.device):
    """A rank's CUDA stream, with memory in torch's cache: cudaMalloc waits for kernels, and those may wait for the rank
    that calls it, where several ranks share a GPU."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        held = [torch.empty(size, dtype=torch.uint8, device=device) for size in [256 << 20] + 32 * [1 << 19]]
    del held
    return stream


def on_ranks(groups, function):
    """function(rank) on a thread each, on a CUDA stream of its own where there is CUDA. Raises the first failure."""
    results, errors = [None] * len(groups), [None] * len(groups)
    devices = [torch.device(group.device) for group in groups]
    streams = [stream_of(rank, device) if device.type == "cuda" else None for rank, device in enumerate(devices)]

    def run(rank):
        try:
            if streams[rank]:
                with torch.cuda.device(devices[rank]), torch.cuda.stream(streams[rank]):
                    results[rank] = function(rank)
                    streams[rank].synchronize()
            else:
                results[rank] = function(rank)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results


def check_round(eps, problem: Problem, rng: np.random.Generator, e4m3: bool, exact: bool, split: bool, residual: bool):
    """One dispatch and one combine on all ranks, every byte checked. E4M3: from BF16, or scales of either order."""
    groups = [ep.group for ep in eps]
    kind = str(rng.choice(["bf16", "row-major", "mn-major"])) if e4m3 else "bf16"
    tokens = [len(x) for x in problem.x]
    seeds = rng.integers(2**31, size=len(eps)).tolist()

    def dispatch(rank):
        ep, device = eps[rank], groups[rank].device
        x, idx, weights = (a[rank].to(device) for a in (problem.x, problem.topk_idx, problem.topk_weights))
        if kind != "bf16":
            data, scales = phalanx.quantize(x)
            x = (data, scales if kind == "mn-major" else scales.contiguous())
        groups[rank].barrier()  # inputs are there: copies, too, may wait for other ranks' kernels
        capacity = None if exact else min(ep.max_rows, tokens_bound(problem) + 5)
        options = {"capacity": capacity, "quantize": e4m3 and kind == "bf16"}
        if split and not exact:
            return ep.dispatch_send(x, idx, weights, **options)()
        return ep.dispatch(x, idx, weights, **options)

    dispatched = on_ranks(groups, dispatch)
    rows = [check_rows(problem, rank, result) for rank, result in enumerate(dispatched)]

    inputs, residuals = [], []
    for rank, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        capacity = len(dispatched[rank].row_weights)
        inputs.append(torch.randn(capacity, problem.config.hidden, generator=generator).bfloat16())
        residuals.append(torch.randn(tokens[rank], problem.config.hidden, generator=generator).bfloat16())

    def combine(rank):
        device = groups[rank].device
        function = eps[rank].combine_send if split else eps[rank].combine
        extra = residuals[rank].to(device) if residual else None
        values = inputs[rank].to(device)
        groups[rank].barrier()
        out = function(values, dispatched[rank].handle, tokens=tokens[rank], residual=extra)
        return out() if split else out

    combined = on_ranks(groups, combine)
    for ep in eps:
        ep.check()  # says more than wrong sums do
    for rank, out in enumerate(combined):
        wanted = expected_sums(problem, rank, rows, inputs, residuals[rank] if residual else None)
        assert torch.equal(out.cpu().view(torch.int16), wanted.view(torch.int16)), f"rank {rank}"


def check_sends_ahead(eps, problems: list[Problem]) -> None:
    """With two buffers: each rank sends the next tokens before it receives the last ones."""
    groups = [ep.group for ep in eps]

    def dispatch(rank):
        inputs = [[a[rank].to(groups[rank].device) for a in (p.x, p.topk_idx, p.topk_weights)] for p in problems]
        groups[rank].barrier()
        results, receive = [], None
        for arguments, problem in zip(inputs, problems, strict=True):
            next_one = eps[rank].dispatch_send(*arguments, capacity=tokens_bound(problem))
            if receive:
                results.append(receive())
            receive = next_one
        return [*results, receive()]

    for rank, results in enumerate(on_ranks(groups, dispatch)):
        for problem, result in zip(problems, results, strict=True):
            check_rows(problem, rank, result)


def check_batches_in_turn(eps, problems: list[Problem]) -> None:
    """All dispatches, then all combines: nothing but sums goes between two of these, whatever their tokens' number."""
    groups = [ep.group for ep in eps]

    def values_of(rank, i):
        generator = torch.Generator().manual_seed(1000 * rank + i)
        return torch.randn(tokens_bound(problems[i]), problems[i].config.hidden, generator=generator).bfloat16()

    def run(rank):
        device = groups[rank].device
        inputs = [[a[rank].to(device) for a in (p.x, p.topk_idx, p.topk_weights)] for p in problems]
        values = [values_of(rank, i).to(device) for i in range(len(problems))]
        groups[rank].barrier()
        results = [
            eps[rank].dispatch(*arguments, capacity=tokens_bound(problem))
            for arguments, problem in zip(inputs, problems, strict=True)
        ]
        return results, [
            eps[rank].combine(values[i], result.handle, tokens=len(problems[i].x[rank]))
            for i, result in enumerate(results)
        ]

    done = on_ranks(groups, run)
    for i, problem in enumerate(problems):
        rows = [check_rows(problem, rank, results[i]) for rank, (results, _) in enumerate(done)]
        values = [values_of(rank, i) for rank in range(len(eps))]
        for rank, (_, outs) in enumerate(done):
            wanted = expected_sums(problem, rank, rows, values)
            assert torch.equal(outs[i].cpu().view(torch.int16), wanted.view(torch.int16)), f"batch {i}, rank {rank}"


def tokens_bound(problem: Problem) -> int:
    """Rows that no rank exceeds."""
    choices = sum(idx.numel() for idx in problem.topk_idx)
    return choices + problem.config.num_experts * (problem.config.alignment - 1)
