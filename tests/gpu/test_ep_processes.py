"""Expert parallelism as it is deployed: one process a GPU, over NCCL, on all GPUs there are."""

import os
import signal
import time

import numpy as np
import phalanx
import pytest

torch = pytest.importorskip("torch")

from cases import ep as cases  # noqa: E402

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="one GPU")]


def in_processes(function, *arguments) -> list[int]:
    """function(rank, size, NCCL ids of three groups, ...) in a process for each GPU; their exit codes."""
    ids = [phalanx.Group.nccl_id() for _ in range(3)]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=(r, NUM_GPUS, ids, *arguments)) for r in range(NUM_GPUS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def join(group_id: bytes, rank: int, size: int, timeout: float) -> phalanx.Group:
    torch.cuda.set_device(rank)
    torch.set_num_threads(4)
    return phalanx.Group.nccl(group_id, rank, size, rank, timeout=timeout)


def close(ep) -> None:
    """When all ranks are done: their last kernels may still write to this one's memory."""
    torch.cuda.synchronize()
    ep.group.barrier()
    ep.close()


def check_round(ep, problem: cases.Problem, seed: int, e4m3: bool, exact: bool, split: bool) -> None:
    """This rank's part of a dispatch and a combine, every byte."""
    rank, config = ep.group.rank, problem.config
    x, idx, weights = (a[rank].cuda() for a in (problem.x, problem.topk_idx, problem.topk_weights))
    capacity = None if exact else min(ep.max_rows, cases.tokens_bound(problem) + 5)
    send = ep.dispatch if exact or not split else lambda *a, **o: ep.dispatch_send(*a, **o)()
    result = send(x, idx, weights, capacity=capacity, quantize=e4m3)
    cases.check_rows(problem, rank, result)
    rows = [cases.expected_rows(problem, r) for r in range(config.num_ranks)]
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(r.offsets[-1], config.hidden, generator=generator).bfloat16() for r in rows]
    mine = torch.full((len(result.row_weights), config.hidden), float("nan"), dtype=torch.bfloat16)
    mine[: len(values[rank])] = values[rank]
    out = ep.combine(mine.cuda(), result.handle, tokens=len(x))
    wanted = cases.expected_sums(problem, rank, rows, values)
    assert torch.equal(out.cpu().view(torch.int16), wanted.view(torch.int16))
    ep.check()


def rounds(rank: int, size: int, ids: list[bytes], seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = join(ids[0], rank, size, 20.0)
    for latency in (False, True):
        shapes = [
            cases.Config(size, 16 * int(rng.integers(1, 60)), 5 * size, 6, 300, alignment=4),  # some CTAs only send
            cases.Config(size, 16 * int(rng.integers(1, 60)), int(rng.integers(1, 80)), int(rng.integers(1, 9)), 40),
            cases.Config(size, 7168, 256, 8, 128),
        ]
        for config in shapes:
            ep = config.make(group, dtype="bf16", latency=latency)
            for round in range(4 if config.hidden < 7168 else 2):
                problem = cases.random_problem(config, rng, hot=0.3 * (round % 2))
                check_round(ep, problem, seed + round, round % 2 == 0, round == 1, round == 2)
            close(ep)
    graphs(group, rng)


def graphs(group: phalanx.Group, rng: np.random.Generator) -> None:
    """Graphs of both regimes in turn, thousands of rounds, every result the first one's."""
    rank, size, captured = group.rank, group.size, []
    for latency in (True, False):
        config = cases.Config(size, 1024, 4 * size, 4, 64)
        ep = config.make(group, dtype="bf16", latency=latency)
        problem = cases.random_problem(config, rng)
        x, idx, weights = (a[rank].cuda() for a in (problem.x, problem.topk_idx, problem.topk_weights))
        capacity = cases.tokens_bound(problem)
        result = ep.dispatch(x, idx, weights, capacity=capacity)
        cases.check_rows(problem, rank, result)
        first = ep.combine(result.rows, result.handle, tokens=len(x))
        out = torch.empty_like(first)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                ep.dispatch(x, idx, weights, capacity=capacity, out=result)
                ep.combine(result.rows, result.handle, tokens=len(x), out=out)
        captured.append((ep, graph, out, first, x, idx, weights, result))  # graphs keep no tensor alive
    for turn in range(40):
        ep, graph, out, first, *_ = captured[turn % 2]
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()  # a rank without tokens compares nothing, and must not leave before the others
        assert torch.equal(out.view(torch.int16), first.view(torch.int16)), f"turn {turn}"
        ep.check()
    for ep, *_ in captured:
        close(ep)


def faults(rank: int, size: int, ids: list[bytes], seed: int) -> None:
    """In both regimes: the last rank comes late, brings another shape, is killed; the others name it, and go on."""
    rng = np.random.default_rng(seed)
    group = join(ids[0], rank, size, 3.0)
    for latency, group_id in ((False, ids[1]), (True, ids[2])):
        last, size = size - 1, size - 1
        config = cases.Config(last + 1, 256, 4 * last + 4, 2, 16)
        other = cases.Config(last + 1, 512, 4 * last + 4, 2, 16)
        with pytest.raises(ValueError, match=f"rank 0 has hidden=256, rank {last} has hidden=512"):
            (other if rank == last else config).make(group)
        ep = config.make(group, dtype="bf16", latency=latency)
        problem = cases.random_problem(config, rng, tokens=[16] * (last + 1))
        if rank == last:
            time.sleep(1)
        check_round(ep, problem, seed, False, False, False)
        x, idx = problem.x[rank].cuda(), problem.topk_idx[rank].cuda()
        group.barrier()
        if rank == last:
            os.kill(os.getpid(), signal.SIGKILL)
        ep.dispatch(x, idx, capacity=ep.max_rows)
        torch.cuda.synchronize()
        wanted = rf"rank {rank} of {last + 1}.*peer {last}, operation 2.*within 3 s"
        with pytest.raises(phalanx.PeerTimeoutError, match=wanted):
            ep.check()
        ep.close()
        group.close()
        assert torch.ones(10, device="cuda").sum().item() == 10
        if last < 2:
            return
        group = join(group_id, rank, last, 3.0)
        problem = cases.random_problem(cases.Config(last, 256, 4 * last, 2, 16), rng, tokens=[16] * last)
        ep = problem.config.make(group, dtype="bf16", latency=latency)
        check_round(ep, problem, seed, True, False, False)
        close(ep)


def without_the_last(rank: int, size: int, ids: list[bytes]) -> None:
    if rank == size - 1:
        return
    with pytest.raises(phalanx.PeerTimeoutError, match=rf"rank {rank} of {size}: not all ranks joined.*30 s"):
        join(ids[0], rank, size, 1.0)
    assert torch.ones(10, device="cuda").sum().item() == 10


def test_a_rank_that_never_joins():
    assert in_processes(without_the_last) == [0] * NUM_GPUS


def test_rounds(seed):
    assert in_processes(rounds, seed) == [0] * NUM_GPUS


def test_the_others_go_on_when_a_rank_is_killed(seed):
    killed = min(2, NUM_GPUS - 1)
    assert in_processes(faults, seed) == [0] * (NUM_GPUS - killed) + [-signal.SIGKILL] * killed
