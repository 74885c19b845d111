"""Expert parallelism on GPUs, ranks being threads of one process: on one GPU together, or on all there are."""

import random
import threading
import time

import numpy as np
import phalanx
import pytest

torch = pytest.importorskip("torch")

from cases import ep as cases  # noqa: E402

pytestmark = pytest.mark.gpu

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def devices(num_ranks, spread):
    return [f"cuda:{rank % NUM_GPUS if spread else 0}" for rank in range(num_ranks)]


def make(config, spread=False, timeout=4.0, **options):
    groups = phalanx.Group.local(devices(config.num_ranks, spread), timeout=timeout)
    # Waiting kernels of all ranks must fit on a GPU together.
    options.setdefault("num_sms", max(1, 100 // config.num_ranks))
    return cases.on_ranks(groups, lambda rank: config.make(groups[rank], **options))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16])
def test_rounds(num_ranks, spread, seed):
    if spread and NUM_GPUS < 2:
        pytest.skip("one GPU")
    rng = np.random.default_rng(seed)
    for latency in (False, True):
        config = cases.Config(
            num_ranks, int(rng.integers(1, 60)) * 16, int(rng.integers(1, 80)), int(rng.integers(1, 9)), 40, alignment=4
        )
        eps = make(config, spread, dtype="bf16", latency=latency)
        for round in range(6):
            problem = cases.random_problem(config, rng, hot=0.3 * (round % 2))
            cases.check_round(eps, problem, rng, round % 2 == 0, round % 3 == 0, round % 3 == 1, round % 2 == 1)
        for ep in eps:
            ep.check()


def test_a_real_shape(seed):
    rng = np.random.default_rng(seed)
    config = cases.Config(2, 7168, 256, 8, 300)
    for latency in (False, True):
        eps = make(config, NUM_GPUS > 1, dtype="bf16", latency=latency)
        problem = cases.random_problem(config, rng, tokens=[300, 277])
        for e4m3 in (False, True):
            cases.check_round(eps, problem, rng, e4m3, False, False, True)


def test_graphs_in_any_order(seed):
    """Captured graphs take the epoch of their turn: any order, the same on all ranks, mixed with eager calls."""
    rng = np.random.default_rng(seed)
    config = cases.Config(2, 512, 32, 4, 24)
    eps = make(config, NUM_GPUS > 1, latency=True, dtype="bf16")
    groups = [ep.group for ep in eps]
    problems = [cases.random_problem(config, rng, tokens=[24, 17]) for _ in range(3)]
    order = [random.Random(seed).randrange(3) for _ in range(60)]
    rows = [[cases.expected_rows(problem, rank) for rank in range(2)] for problem in problems]
    values = [[torch.randn(220, 512).bfloat16() for _ in range(2)] for _ in problems]

    capturing = threading.Lock()

    def run(rank):
        ep, device, stream = eps[rank], groups[rank].device, torch.cuda.current_stream()
        inputs, graphs, results = [], [], []
        for problem, value in zip(problems, values, strict=True):
            inputs.append([a[rank].to(device) for a in (problem.x, problem.topk_idx, problem.topk_weights, value)])
        groups[rank].barrier()
        eager = ep.dispatch(*inputs[0][:3], capacity=220)
        groups[rank].barrier()
        for x, idx, weights, rows_in in inputs:
            graph = torch.cuda.CUDAGraph()
            with capturing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = ep.dispatch(x, idx, weights, capacity=220, quantize=True)
                out = ep.combine(rows_in, result.handle, tokens=len(x))
            graphs.append(graph)
            results.append((result, out))
        groups[rank].barrier()
        for which in order:
            graphs[which].replay()
            if which == 1:
                ep.dispatch(*inputs[0][:3], capacity=220, out=eager)
        stream.synchronize()
        ep.check()
        graphs.clear()
        return results

    for rank, results in enumerate(cases.on_ranks(groups, run)):
        for which, (result, out) in enumerate(results):
            if which not in order:
                continue
            cases.check_rows(problems[which], rank, result)
            wanted = cases.expected_sums(problems[which], rank, rows[which], values[which])
            assert torch.equal(out.cpu().view(torch.int16), wanted.view(torch.int16))


def test_a_missing_rank_is_named_and_the_context_lives(seed):
    config = cases.Config(2, 256, 8, 2, 16)
    problem = cases.random_problem(config, np.random.default_rng(seed), tokens=[16, 16])
    for latency in (False, True):
        eps = make(config, timeout=0.5, latency=latency)

        def dispatch(rank, eps=eps):
            if rank == 1:
                return
            eps[0].dispatch(problem.x[0].cuda(), problem.topk_idx[0].cuda(), capacity=64, quantize=True)
            torch.cuda.current_stream().synchronize()
            with pytest.raises(phalanx.PeerTimeoutError, match="rank 0 of 2.*peer 1.*operation 1"):
                eps[0].check()

        cases.on_ranks([ep.group for ep in eps], dispatch)
        fresh = make(config, latency=latency)
        cases.check_round(fresh, problem, np.random.default_rng(seed), True, True, False, False)


def test_abort_wakes_a_waiting_kernel(seed):
    config = cases.Config(2, 256, 8, 2, 16)
    problem = cases.random_problem(config, np.random.default_rng(seed), tokens=[16, 16])
    eps = make(config)

    def dispatch(rank):
        if rank == 1:
            time.sleep(0.3)
            eps[1].group.abort()
            return
        eps[0].dispatch(problem.x[0].cuda(), problem.topk_idx[0].cuda(), capacity=64, quantize=True)
        torch.cuda.current_stream().synchronize()
        with pytest.raises(phalanx.AbortedError, match="rank 1 has aborted"):
            eps[0].check()

    cases.on_ranks([ep.group for ep in eps], dispatch)


def test_overflow_is_raised_by_check(seed):
    config = cases.Config(1, 256, 8, 2, 16)
    (ep,) = make(config, dtype="bf16")
    problem = cases.random_problem(config, np.random.default_rng(seed), tokens=[16])
    needed = cases.expected_rows(problem, 0).offsets[-1]
    result = ep.dispatch(problem.x[0].cuda(), problem.topk_idx[0].cuda(), capacity=needed - 2)
    torch.cuda.synchronize()
    with pytest.raises(phalanx.CapacityError, match=f"{needed} rows, but room for {needed - 2}"):
        ep.check()
    assert int(result.offsets[-1]) == needed
    again = ep.dispatch(problem.x[0].cuda(), problem.topk_idx[0].cuda(), capacity=needed)
    torch.cuda.synchronize()
    ep.check()
    cases.check_rows(
        cases.Problem(config, problem.x, problem.topk_idx, [torch.ones_like(problem.topk_weights[0])]), 0, again
    )
