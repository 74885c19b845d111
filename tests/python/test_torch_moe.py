"""PyTorch on the CPU: tokens to their experts and back, with gradients, traced and not."""

import phalanx
import pytest

torch = pytest.importorskip("torch")
from cases.views import behind_three_others  # noqa: E402


@pytest.fixture
def topk_idx():
    return torch.tensor([[1, 0], [1, -1], [3, 3], [-1, -1], [0, 2]])


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator, requires_grad=True)
    weights = torch.rand(5, 2, generator=generator, requires_grad=True)
    residual = torch.randn(5, 8, generator=generator, requires_grad=True)
    return x, weights, residual


def layer(x, weights, residual, topk_idx, fused, max_rows):
    """Each expert multiplies its rows by its own number."""
    if fused:
        rows, routing = phalanx.route_and_permute(x, topk_idx, 4, max_rows=max_rows)
    else:
        routing = phalanx.route(topk_idx, 4, max_rows=max_rows)
        rows = phalanx.permute(x, routing)
    flat = rows.reshape(-1, rows.shape[-1])
    chosen = topk_idx.flatten()[routing.sources.clamp(min=0)]
    rows = (torch.tanh(flat) * (2 + chosen[:, None])).reshape(rows.shape)
    return phalanx.unpermute(rows, routing, weights, residual)


def plain(x, weights, residual, topk_idx):
    there = (topk_idx >= 0)[..., None]
    each = torch.tanh(x)[:, None] * (2 + topk_idx[..., None]) * weights[..., None]
    return torch.where(there, each, 0).sum(1) + residual


@pytest.mark.parametrize(
    "fused, max_rows, backend",
    [(False, 0, None), (True, 3, None), (True, 0, "aot_eager"), (False, 3, "aot_eager")],
)
def test_gradients(tokens, topk_idx, fused, max_rows, backend):
    function = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    y, expected = function(*tokens, topk_idx, fused, max_rows), plain(*tokens, topk_idx)
    torch.testing.assert_close(y, expected)
    grad = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad(y, tokens, grad)
    for one, other in zip(actual, torch.autograd.grad(expected, tokens, grad), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_in_bf16(tokens, topk_idx):
    x = tokens[0].detach().bfloat16().requires_grad_()
    rows, routing = phalanx.route_and_permute(x, topk_idx, 4)
    (grad,) = torch.autograd.grad(rows.float().sum(), x, retain_graph=True)
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad.float(), (topk_idx >= 0).sum(1, keepdim=True).expand(5, 8).float())
    y = phalanx.unpermute(rows, routing, out_dtype=torch.float32)
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("target", [{}, {"max_rows": 5}], ids=str)
def test_gradients_that_begin_anywhere(topk_idx, target):
    x, weights = torch.randn(5, 8, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    upstream, routing = torch.randn(5, 8), phalanx.route(topk_idx, 4, **target)

    def gradients(view):
        y = view(phalanx.unpermute(view(phalanx.permute(x, routing)) * 2, routing, weights))
        return torch.autograd.grad(y, (x, weights), upstream)

    for ours, expected in zip(gradients(behind_three_others), gradients(lambda y: y), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", [{}, {"alignment": 8}, {"max_rows": 5}], ids=str)
def test_one_trace_for_any_number_of_tokens(topk_idx, fused, target):
    def there(x, topk_idx):
        if fused:
            return phalanx.route_and_permute(x, topk_idx, 4, **target)[0]
        return phalanx.permute(x, phalanx.route(topk_idx, 4, **target))

    class There(torch.nn.Module):
        def forward(self, x, topk_idx):
            return there(x, topk_idx)

    x, tokens = torch.randn(5, 8), torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(There(), (x, topk_idx), dynamic_shapes=({0: tokens}, {0: tokens})).module()
    for count in (5, 3, 2):
        assert torch.equal(exported(x[:count], topk_idx[:count]), there(x[:count], topk_idx[:count]))


def test_fake_kernels_tell_the_truth(topk_idx):
    x = torch.randn(5, 128).bfloat16()
    routing = phalanx.route(topk_idx, 4, max_rows=2)
    maps = routing.slots, routing.sources
    rows, weights = phalanx.permute(x, routing), torch.rand(5, 2)
    q, ops = phalanx.quantize(x), torch.ops.phalanx
    calls = [
        (ops.route, (topk_idx, 4, 20, 4, 0)),
        (ops.permute, (x, *maps, 2, True)),
        (ops.permute_quantized, (*q, *maps, 2, True)),
        (ops.route_and_permute, (x, topk_idx, 4, 8, 1, 2, True)),
        (ops.route_and_permute_quantized, (*q, topk_idx, 4, 10, 1, 0, True)),
        (ops.unpermute, (rows, *maps, weights, x, torch.bfloat16)),
        (ops.unpermute_backward, (x, *maps, weights, rows, torch.bfloat16, 2, True)),
        (ops.unpermute_backward, (x, *maps, None, None, torch.float32, 0, True)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_faketensor", "test_autograd_registration"))


def test_out_is_refused_where_calls_are_recorded(tokens, topk_idx):
    routing = phalanx.route(topk_idx, 4)
    with pytest.raises(ValueError, match="out: given to a call"):
        phalanx.permute(tokens[0], routing, out=torch.empty(10, 8))


def test_a_second_derivative_is_refused(topk_idx, tokens):
    routing = phalanx.route(topk_idx, 4)
    rows = torch.randn(len(routing.sources), 8, requires_grad=True)
    y = phalanx.unpermute(rows, routing, tokens[1])
    (grad,) = torch.autograd.grad(y.pow(2).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="unpermute_backward has no gradient"):
        grad.pow(2).sum().backward()
