"""Expert parallelism from Python, ranks being threads on the CPU."""

import copy
import pickle

import numpy as np
import phalanx
import pytest

torch = pytest.importorskip("torch")

from cases import ep as cases  # noqa: E402
from cases.views import behind_three_others  # noqa: E402

SMALL = cases.Config(num_ranks=3, hidden=64, num_experts=7, topk=3, max_tokens=9)


def make(config, timeout=30.0, **options):
    groups = phalanx.Group.local(config.num_ranks, timeout=timeout)
    return cases.on_ranks(groups, lambda rank: config.make(groups[rank], **options))


@pytest.mark.parametrize("num_ranks", [1, 2, 16])
def test_rounds(num_ranks, seed):
    rng = np.random.default_rng(seed)
    config = cases.Config(num_ranks, int(rng.integers(1, 30)) * 16, int(rng.integers(1, 50)), 4, 12, alignment=4)
    eps = make(config, dtype="bf16", latency=bool(num_ranks % 2))
    for round in range(4):
        problem = cases.random_problem(config, rng, hot=0.3 * (round % 2))
        cases.check_round(eps, problem, rng, round % 2 == 0, round % 3 == 0, round % 3 == 1, round % 2 == 1)


def test_sends_go_on_before_what_was_sent_last_is_received(seed):
    rng = np.random.default_rng(seed)
    eps = make(SMALL, dtype="bf16", latency=True)
    cases.check_sends_ahead(eps, [cases.random_problem(SMALL, rng) for _ in range(6)])


@pytest.mark.parametrize("latency", [False, True])
def test_batches_in_turn(latency, seed):
    rng = np.random.default_rng(seed)
    eps = make(SMALL, dtype="bf16", latency=latency)
    for _ in range(4):
        cases.check_batches_in_turn(eps, [cases.random_problem(SMALL, rng) for _ in range(2)])


def test_as_many_choices_as_there_may_be(seed):
    rng = np.random.default_rng(seed)
    config = cases.Config(1, 64, 40, 32, 9)
    problem = cases.random_problem(config, rng, tokens=[9])
    cases.check_round(make(config, dtype="bf16"), problem, rng, False, False, False, False)


def test_quantized_input_and_numpy(seed):
    rng = np.random.default_rng(seed)
    eps = make(SMALL)
    problem = cases.random_problem(SMALL, rng)
    groups = [ep.group for ep in eps]

    def dispatch(rank):
        return eps[rank].dispatch(phalanx.quantize(problem.x[rank]), problem.topk_idx[rank], problem.topk_weights[rank])

    results = cases.on_ranks(groups, dispatch)
    for rank, result in enumerate(results):
        cases.check_rows(problem, rank, result)

    def dispatch_numpy(rank):
        x = phalanx.quantize(problem.x[rank].float().numpy())
        return eps[rank].dispatch(x, problem.topk_idx[rank].numpy(), problem.topk_weights[rank].numpy())

    for result, theirs in zip(cases.on_ranks(groups, dispatch_numpy), results, strict=True):
        assert isinstance(result.rows.data, np.ndarray)
        assert np.array_equal(result.rows.scales, theirs.rows.scales.numpy())
        assert np.array_equal(result.rows.data.view(np.uint8), theirs.rows.data.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("latency", [False, True])
def test_the_first_half_without_a_capacity(latency, seed):
    """The routing goes ahead of the first half, and the second must not wait for another."""
    rng = np.random.default_rng(seed)
    eps = make(SMALL, timeout=2.0, dtype="bf16", latency=latency)
    for quantize in (False, True):
        problem = cases.random_problem(SMALL, rng)

        def dispatch(rank, problem=problem, quantize=quantize):
            ep, x, inputs = eps[rank], problem.x[rank], (problem.topk_idx[rank], problem.topk_weights[rank])
            first = ep.dispatch_send(x, *inputs, capacity=None, quantize=quantize)()
            again = ep.dispatch_send(x, handle=first.handle, capacity=None, quantize=quantize)()
            into = ep.dispatch_send(x, *inputs, capacity=None, out=again)()
            assert into.handle is again.handle
            return first, into

        for rank, results in enumerate(cases.on_ranks([ep.group for ep in eps], dispatch)):
            for result in results:
                rows = cases.check_rows(problem, rank, result)
                assert len(result.row_weights) == rows.offsets[-1]


def test_a_handle_beside_out(seed):
    """The routing is the handle's, whatever out has been before."""
    rng = np.random.default_rng(seed)
    eps = make(SMALL, dtype="bf16")
    problems = [cases.random_problem(SMALL, rng, tokens=[9, 4, 6]) for _ in range(2)]

    def dispatch(rank):
        ep = eps[rank]
        results = [ep.dispatch(p.x[rank], p.topk_idx[rank], p.topk_weights[rank], capacity=90) for p in problems]
        handle, x = results[0].handle, problems[0].x[rank]
        for half in (ep.dispatch, lambda *a, **o: ep.dispatch_send(*a, capacity=90, **o)()):
            results[1].rows.zero_()
            result = half(x, handle=handle, out=results[1])
            assert result.rows is results[1].rows and result.handle is handle
            cases.check_rows(problems[0], rank, result)

    cases.on_ranks([ep.group for ep in eps], dispatch)


def test_what_contradicts_out_is_refused():
    (group,) = phalanx.Group.local(1)
    for latency in (False, True):
        ep = cases.Config(1, 32, 4, 2, 8).make(group, dtype="bf16", latency=latency)
        x, idx = torch.ones(4, 32, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
        plain, quantized = (ep.dispatch(x, idx, capacity=30, quantize=quantize) for quantize in (False, True))
        for call in (ep.dispatch, ep.dispatch_send):
            with pytest.raises(ValueError, match="quantize: True; expected False, as out.rows are BF16"):
                call(x, idx, capacity=30, quantize=True, out=plain)
            for out in (plain, quantized):
                with pytest.raises(ValueError, match="capacity: 1; expected 30, the rows of out"):
                    call(x, idx, capacity=1, out=out)
        assert ep.dispatch(x, idx, capacity=30, quantize=True, out=quantized).rows is quantized.rows
        assert ep.dispatch(x, idx, out=quantized).rows is quantized.rows


def test_the_grouped_product_reads_the_rows(seed):
    """A layer of experts over ranks: nothing is copied between dispatch, product and combine."""
    rng = np.random.default_rng(seed)
    config = cases.Config(2, 256, 5, 2, 8)
    eps = make(config, dtype="bf16")
    problem = cases.random_problem(config, rng, tokens=[8, 5])
    first = config.first_experts()
    matrices = [torch.from_numpy(rng.standard_normal((256, 256), dtype=np.float32)).bfloat16() for _ in range(5)]
    quantized = [phalanx.quantize(matrix, block=(128, 128)) for matrix in matrices]

    def layer(rank):
        x, idx, weights = problem.x[rank], problem.topk_idx[rank], problem.topk_weights[rank]
        result = eps[rank].dispatch(phalanx.quantize(x), idx, weights)
        mine = quantized[first[rank] : first[rank + 1]]
        stack = [torch.stack([getattr(q, name).contiguous() for q in mine]) for name in ("data", "scales")]
        rows = phalanx.grouped_gemm_fp8(result.rows, stack, result.offsets)
        return eps[rank].combine(rows, result.handle, tokens=len(x))

    for rank, out in enumerate(cases.on_ranks([ep.group for ep in eps], layer)):
        wanted = torch.zeros(len(out), 256)
        for t, k in np.argwhere(problem.topk_idx[rank].numpy() >= 0):
            product = matrices[int(problem.topk_idx[rank][t, k])].float() @ problem.x[rank][t].float()
            wanted[t] += problem.topk_weights[rank][t, k] * product
        assert (out.float() - wanted).norm() <= 0.06 * wanted.norm()


def test_capacity_error_says_how_many(seed):
    eps = make(SMALL, dtype="bf16")
    problem = cases.random_problem(SMALL, np.random.default_rng(seed), tokens=[9, 9, 9])

    def dispatch(rank):
        needed = cases.expected_rows(problem, rank).offsets[-1]
        with pytest.raises(phalanx.CapacityError, match=f"{needed} rows, but room for {needed - 1}"):
            eps[rank].dispatch(problem.x[rank], problem.topk_idx[rank], capacity=needed - 1)

    cases.on_ranks([ep.group for ep in eps], dispatch)


def test_a_missing_rank_is_named():
    eps = make(SMALL, timeout=0.2, dtype="bf16")
    problem = cases.random_problem(SMALL, np.random.default_rng(0), tokens=[4, 4, 4])

    def dispatch(rank):
        if rank == 2:
            return
        with pytest.raises(phalanx.PeerTimeoutError, match="peer 2"):
            eps[rank].dispatch(problem.x[rank], problem.topk_idx[rank])

    cases.on_ranks([ep.group for ep in eps], dispatch)


def test_gradients(seed):
    """Against one big dense layer: the mixture's output and all gradients."""
    import phalanx.torch_ep as torch_ep

    rng = np.random.default_rng(seed)
    config = cases.Config(2, 32, 5, 2, 6)
    eps = make(config, dtype="bf16")
    problem = cases.random_problem(config, rng, tokens=[6, 5])
    first = config.first_experts()
    factors = torch.from_numpy(rng.random((config.num_experts, config.hidden), dtype=np.float32)).bfloat16()

    def layer(rank):
        x = problem.x[rank].clone().requires_grad_()
        weights = problem.topk_weights[rank].clone().requires_grad_()
        rows, result = torch_ep.dispatch(eps[rank], x, problem.topk_idx[rank], weights)
        local = torch.repeat_interleave(factors[first[rank] : first[rank + 1]], result.counts, dim=0)
        out = torch_ep.combine(eps[rank], rows * local, result, weights, tokens=len(x))
        out.backward(torch.ones_like(out))
        return out.detach(), x.grad, weights.grad

    for rank, (out, grad_x, grad_weights) in enumerate(cases.on_ranks([ep.group for ep in eps], layer)):
        x = problem.x[rank].float().requires_grad_()
        weights = problem.topk_weights[rank].clone().requires_grad_()
        idx = problem.topk_idx[rank].long()
        chosen = factors.float()[idx.clamp(min=0)] * (idx >= 0)[..., None]
        wanted = (weights[..., None] * chosen * x[:, None]).sum(1)
        wanted.sum().backward()
        torch.testing.assert_close(out.float(), wanted, rtol=0.03, atol=0.03)
        torch.testing.assert_close(grad_x.float(), x.grad, rtol=0.03, atol=0.03)
        torch.testing.assert_close(grad_weights, weights.grad, rtol=0.03, atol=0.15)


def test_gradients_that_begin_anywhere(seed):
    import phalanx.torch_ep as torch_ep

    rng = np.random.default_rng(seed)
    config = cases.Config(2, 32, 5, 2, 6)
    eps = make(config, dtype="bf16")
    problem = cases.random_problem(config, rng, tokens=[6, 5])
    upstream = torch.from_numpy(rng.standard_normal((6, 32), dtype=np.float32)).bfloat16()

    def gradients(view):
        def layer(rank):
            inputs = [y.clone().requires_grad_() for y in (problem.x[rank], problem.topk_weights[rank])]
            rows, result = torch_ep.dispatch(eps[rank], inputs[0], problem.topk_idx[rank], inputs[1])
            out = torch_ep.combine(eps[rank], view(rows) * 2, result, inputs[1], tokens=len(inputs[0]))
            return torch.autograd.grad(view(out), inputs, upstream[: len(out)])

        return cases.on_ranks([ep.group for ep in eps], layer)

    for ours, expected in zip(gradients(behind_three_others), gradients(lambda y: y), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.fixture
def nan_in_new_memory():
    """torch.empty and its like are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_gradients_with_room_to_spare(seed, nan_in_new_memory):
    """What lies behind the last row adds nothing to the gradient of a parameter of all rows. There are no weights."""
    import phalanx.torch_ep as torch_ep

    config = cases.Config(2, 32, 5, 2, 6)
    eps = make(config, dtype="bf16")
    problem = cases.random_problem(config, np.random.default_rng(seed), tokens=[6, 5])
    first = config.first_experts()

    def layer(rank):
        scale = torch.full((1, 32), 0.5, dtype=torch.bfloat16, requires_grad=True)
        x = problem.x[rank].clone().requires_grad_()
        rows, result = torch_ep.dispatch(eps[rank], x, problem.topk_idx[rank], capacity=30)
        end = result.offsets[-1]
        assert end < 30 and not rows[end:].any() and not result.row_weights[end:].any()
        out = torch_ep.combine(eps[rank], rows * scale, result, tokens=len(x))
        out.backward(torch.ones_like(out))
        return out.detach(), x.grad, scale.grad

    for rank, (out, grad_x, grad_scale) in enumerate(cases.on_ranks([ep.group for ep in eps], layer)):
        x, times = problem.x[rank].float(), (problem.topk_idx[rank] >= 0).sum(1, keepdim=True)
        torch.testing.assert_close(out.float(), 0.5 * times * x, rtol=0.03, atol=0.03)
        torch.testing.assert_close(grad_x.float(), 0.5 * times.expand(-1, 32).float(), rtol=0.03, atol=0.03)
        wanted = torch.zeros(1, 32)
        for theirs, idx in zip(problem.x, problem.topk_idx, strict=True):
            here = (idx >= first[rank]) & (idx < first[rank + 1])
            wanted += (here.sum(1, keepdim=True) * theirs.float()).sum(0)
        torch.testing.assert_close(grad_scale.float(), wanted, rtol=0.03, atol=0.1)


def test_buffer_bytes_of_uneven_experts():
    """The tables are as long as the fullest rank's."""
    sizes = {"hidden": 256, "topk": 4, "max_tokens": 8192, "num_experts": 256}
    even, uneven, padded = (
        phalanx.ExpertParallel.buffer_bytes(2, **sizes | {"num_experts": sum(experts)}, experts_per_rank=experts)
        for experts in ((128, 128), (200, 56), (200, 200))
    )
    assert phalanx.ExpertParallel.buffer_bytes(2, **sizes) == even < uneven == padded


def test_another_number_of_tokens_is_refused():
    (group,) = phalanx.Group.local(1)
    ep = cases.Config(1, 32, 4, 2, 8).make(group, dtype="bf16")
    x, idx = torch.zeros(4, 32, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="topk_idx: 3 tokens; expected 4, those of x"):
        ep.dispatch(x, idx[:3])
    result = ep.dispatch(x, idx)
    with pytest.raises(ValueError, match="x has 3 tokens, expected 4"):
        ep.dispatch(x[:3], handle=result.handle)
    for tokens in (0, 3, 5):
        with pytest.raises(ValueError, match=f"out has {tokens} tokens, expected 4"):
            ep.combine(result.rows, result.handle, tokens=tokens)
    assert ep.combine(result.rows, result.handle, tokens=4).shape == (4, 32)


def test_wrong_arguments_are_named():
    for device in ("tpu", "cuda:x", -5):
        with pytest.raises(ValueError, match="device:.*expected cpu, cuda"):
            phalanx.Group.local([device])
    with pytest.raises(ValueError, match="device: 4294967296 is out of range"):
        phalanx.Group.local([1 << 32])
    with pytest.raises(ValueError, match="rank: 4294967296 is out of range"):
        phalanx.Group.process(1 << 32, 2, "cuda:0", lambda mine: [mine] * 2)
    with pytest.raises(ValueError, match="experts_per_rank: 4294967298 is out of range"):
        cases.Config(1, 32, 2, 2, 8, experts_per_rank=[(1 << 32) + 2]).make(phalanx.Group.local(1)[0])
    (group,) = phalanx.Group.local(1)
    ep = cases.Config(1, 32, 4, 2, 8).make(group)
    x = torch.zeros(4, 32, dtype=torch.bfloat16)
    idx = torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="rows"):
        ep.dispatch(x, idx)  # BF16 rows, where the buffer holds E4M3
    with pytest.raises(ValueError, match="topk_idx, handle"):
        ep.dispatch(x)
    with pytest.raises(ValueError, match="max_tokens"):
        ep.dispatch(torch.zeros(9, 32, dtype=torch.bfloat16), torch.zeros(9, 2, dtype=torch.int64), quantize=True)
    with pytest.raises(ValueError, match="capacity: -1"):
        ep.dispatch(x, idx, quantize=True, capacity=-1)
    with pytest.raises(TypeError, match="x: expected a Quantized or a pair"):
        ep.dispatch((x, x, x), idx)
    with pytest.raises(ValueError, match="num_ranks is 0"):
        ep.buffer_bytes(0, hidden=32, num_experts=4, topk=2, max_tokens=8)
    with pytest.raises(TypeError, match="num_experts"):
        ep.buffer_bytes(1, hidden=32, topk=2, max_tokens=8)
    with pytest.raises(ValueError, match="topk is 40"):
        cases.Config(1, 32, 4, 40, 8).make(group)
    ep.close()
    ep.close()
    for call in (ep.check, lambda: ep.dispatch(x, idx, quantize=True)):
        with pytest.raises(phalanx.AbortedError, match="closed"):
            call()
    with pytest.raises(phalanx.AbortedError):
        group.close()
        group.barrier()


def test_copies_are_the_same_and_close_nothing():
    config = cases.Config(num_ranks=1, hidden=64, num_experts=2, topk=1, max_tokens=4)
    (ep,) = make(config)
    for owner in (ep, ep.group):
        assert copy.copy(owner) is owner and copy.deepcopy([owner])[0] is owner
        with pytest.raises(TypeError, match="belongs to its process"):
            pickle.dumps(owner)
    ep.group.barrier()
    ep.check()


@pytest.mark.parametrize("capacity", ["3", 2.5])
def test_counts_are_integers(capacity):
    (ep,) = make(cases.Config(num_ranks=1, hidden=64, num_experts=2, topk=1, max_tokens=4))
    x = phalanx.quantize(torch.zeros(2, 64))
    with pytest.raises(TypeError, match="^capacity: .* expected an integer"):
        ep.dispatch(x, torch.zeros(2, 1, dtype=torch.int32), capacity=capacity)
    with pytest.raises(TypeError, match="^tokens: .* expected an integer"):
        ep.combine(torch.zeros(2, 64).bfloat16(), None, tokens=capacity)
