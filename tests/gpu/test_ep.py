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


@pytest.mark.parametrize(("num_ranks", "hidden", "tokens"), [(1, 400, 300), (2, 400, 300), (2, 65 * 128, 700)])
def test_many_tokens(num_ranks, hidden, tokens, seed):
    """More choices than SMs times local experts: with two ranks some CTAs only send."""
    rng = np.random.default_rng(seed)
    config = cases.Config(num_ranks, hidden, 10, 6, tokens, alignment=4)
    eps = make(config, NUM_GPUS > 1, dtype="bf16", num_sms=16)
    for round in range(6):
        problem = cases.random_problem(config, rng, hot=0.3 * (round % 2))
        cases.check_round(eps, problem, rng, round % 2 == 0, round == 1, round == 2, round == 3)


@pytest.mark.parametrize("tokens", [12, 400])
def test_sends_go_on_before_what_was_sent_last_is_received(tokens, seed):
    rng = np.random.default_rng(seed)
    config = cases.Config(2, 512, 16, 4, tokens)
    eps = make(config, NUM_GPUS > 1, latency=True, dtype="bf16", num_sms=16)
    cases.check_sends_ahead(eps, [cases.random_problem(config, rng) for _ in range(6)])


@pytest.mark.parametrize("latency", [False, True])
@pytest.mark.parametrize("tokens", [12, 400])
def test_batches_in_turn(tokens, latency, seed):
    """With one buffer, sums of a batch take the places of those that other CTAs have to read first."""
    rng = np.random.default_rng(seed)
    config = cases.Config(2, 512, 16, 4, tokens)
    eps = make(config, NUM_GPUS > 1, latency=latency, dtype="bf16", num_sms=16)
    for _ in range(10):
        cases.check_batches_in_turn(eps, [cases.random_problem(config, rng) for _ in range(2)])


def test_as_many_choices_as_there_may_be(seed):
    """All rows of a token on one rank: more than may be listed ahead in combine."""
    rng = np.random.default_rng(seed)
    config = cases.Config(1, 512, 40, 32, 300)
    for latency in (False, True):
        (ep,) = make(config, latency=latency, dtype="bf16", num_sms=16)
        cases.check_round([ep], cases.random_problem(config, rng, tokens=[300]), rng, False, False, False, False)


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


FAILURE = (
    r"rank 0 of 2.*the peer's {what}.*peer 1, operation {epoch}, expected 0x[0-9a-f]+, seen 0x[0-9a-f]+.*within 1 s"
)


@pytest.mark.parametrize("latency", [False, True])
def test_a_stopped_rank_is_named_and_the_group_can_be_made_anew(latency, seed):
    """Rank 1 stops: at once, after some rounds, or between dispatch and combine."""
    config = cases.Config(2, 256, 8, 2, 16)
    rng = np.random.default_rng(seed)
    problem = cases.random_problem(config, rng, tokens=[16, 16])
    for rounds, has_dispatched in ((0, False), (3, False), (2, True)):
        eps = make(config, NUM_GPUS > 1, timeout=1.0, dtype="bf16", latency=latency)
        for _ in range(rounds):
            cases.check_round(eps, problem, rng, False, False, False, False)

        def stop(rank, eps=eps, rounds=rounds, has_dispatched=has_dispatched):
            ep, device = eps[rank], eps[rank].group.device
            x, idx = problem.x[rank].to(device), problem.topk_idx[rank].to(device)
            rows = torch.zeros(64, config.hidden, dtype=torch.bfloat16, device=device)
            ep.group.barrier()
            if rank == 1 and not has_dispatched:
                return
            result = ep.dispatch(x, idx, capacity=64)
            torch.cuda.current_stream().synchronize()
            if rank == 1:
                return
            if has_dispatched:
                ep.combine(rows, result.handle, tokens=len(x))
                torch.cuda.current_stream().synchronize()
            what = r"sums \(combine\)" if has_dispatched else r"routing \(dispatch\)"
            with pytest.raises(phalanx.PeerTimeoutError, match=FAILURE.format(what=what, epoch=rounds + 1)):
                ep.check()
            with pytest.raises(phalanx.PeerTimeoutError):
                ep.dispatch(x, idx, capacity=64)

        cases.on_ranks([ep.group for ep in eps], stop)
        for ep in eps:
            ep.close()
            ep.group.close()
    fresh = make(config, NUM_GPUS > 1, dtype="bf16", latency=latency)
    cases.check_round(fresh, problem, rng, True, True, False, False)


def test_a_late_rank_is_waited_for(seed):
    config = cases.Config(2, 256, 8, 2, 16)
    problem = cases.random_problem(config, np.random.default_rng(seed), tokens=[16, 13])
    for latency in (False, True):
        eps = make(config, NUM_GPUS > 1, timeout=4.0, dtype="bf16", latency=latency)

        def dispatch(rank, eps=eps):
            ep, device = eps[rank], eps[rank].group.device
            inputs = [a[rank].to(device) for a in (problem.x, problem.topk_idx, problem.topk_weights)]
            ep.group.barrier()
            if rank == 1:
                time.sleep(0.5)
            return ep.dispatch(*inputs, capacity=64)

        for rank, result in enumerate(cases.on_ranks([ep.group for ep in eps], dispatch)):
            cases.check_rows(problem, rank, result)


def test_ranks_that_disagree_are_named(seed):
    """About shapes when they are made; about types when tokens come."""
    config = cases.Config(2, 256, 8, 2, 16)
    problem = cases.random_problem(config, np.random.default_rng(seed), tokens=[16, 16])
    groups = phalanx.Group.local(devices(2, NUM_GPUS > 1), timeout=1.0)
    others = cases.Config(2, 512, 8, 2, 16)

    def disagree(rank):
        with pytest.raises(ValueError, match="rank 0 has hidden=256, rank 1 has hidden=512"):
            (others if rank else config).make(groups[rank], num_sms=8)

    cases.on_ranks(groups, disagree)
    eps = make(config, NUM_GPUS > 1, timeout=1.0, dtype="bf16")

    def dispatch(rank):
        ep, device = eps[rank], eps[rank].group.device
        inputs = [a[rank].to(device) for a in (problem.x, problem.topk_idx)]
        ep.group.barrier()
        ep.dispatch(*inputs, capacity=64, quantize=rank == 1)
        torch.cuda.current_stream().synchronize()
        names = ["bf16 tokens", "e4m3 tokens"]
        match = f"rank {rank} of 2.*peer {1 - rank}.*expected {names[rank]}, rank {1 - rank} sent {names[1 - rank]}"
        with pytest.raises(ValueError, match=match):
            ep.check()

    cases.on_ranks([ep.group for ep in eps], dispatch)


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
