"""The experts of a layer in FP8 beside the same in FP64 and BF16 torch, forward and backward, on the CPU or a GPU."""

import copy
import pickle

import phalanx
import pytest

torch = pytest.importorskip("torch")
from cases.views import behind_three_others  # noqa: E402
from phalanx.nn import ExpertMLP, _forward  # noqa: E402

# Relative errors of norms, and 1 - cosine of gradients. E4M3 has 3 bits of mantissa: a rounded operand is off by 2.6%
# in the mean square, a product of two by 3.7%, a chain of two by some 5%.
MAX_ERROR, MAX_ANGLE = 0.08, 0.004


def plain(x, topk_idx, topk_weights, gate_up, down):
    """One expert after another."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[expert].t()).chunk(2, 1)
        out = (torch.nn.functional.silu(gate) * up) @ down[expert].t()
        y = y + out * torch.where(topk_idx == expert, topk_weights, 0).sum(1, keepdim=True).to(x.dtype)
    return y


def relative_error(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def layer(request):
    if request.param == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9):
        pytest.skip("no Hopper GPU")
    torch.manual_seed(0)
    mlp = ExpertMLP(5, 256, 128, device=request.param)
    x = torch.randn(70, 256, device=request.param).bfloat16().requires_grad_()
    topk_idx = torch.randint(-1, 4, (70, 3), device=request.param)  # nobody chooses the last expert
    topk_weights = torch.rand(70, 3, device=request.param, requires_grad=True)
    return mlp, x, topk_idx, topk_weights


def test_agrees_with_torch(layer):
    mlp, x, topk_idx, topk_weights = layer
    y = mlp(x, topk_idx, topk_weights)
    inputs = x, topk_weights, mlp.gate_up, mlp.down
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = plain(exact[0], topk_idx, *exact[1:])
    assert y.dtype == torch.bfloat16 and relative_error(y, expected) < MAX_ERROR
    assert (
        relative_error(plain(x, topk_idx, *inputs[1:]), expected) < MAX_ERROR
    )  # BF16 in torch: the reference is right

    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs, grad)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for name, one, other in zip(("x", "topk_weights", "gate_up", "down"), ours, theirs, strict=True):
        cosine = torch.nn.functional.cosine_similarity(one.double().flatten(), other.flatten(), dim=0)
        assert 1 - cosine < MAX_ANGLE, f"gradient of {name}: cosine {cosine}, error {relative_error(one, other)}"
        assert relative_error(one, other) < 1.5 * MAX_ERROR, name
    assert not ours[2][4].any() and not ours[3][4].any()  # of the expert that nobody chose


def test_in_one_call_where_nothing_is_recorded(layer):
    mlp, x, topk_idx, topk_weights = layer
    with torch.no_grad():
        y = mlp(x, topk_idx, topk_weights)
        assert mlp(x[:0], topk_idx[:0], topk_weights[:0]).shape == (0, 256)
        assert not mlp(x, torch.full_like(topk_idx, -1), topk_weights).any()
        with pytest.raises(TypeError, match=r"topk_weights: torch\.float64; expected torch\.float32"):
            mlp(x, topk_idx, topk_weights.double())
        with pytest.raises(ValueError, match=r"topk_weights: shape \[70, 2\]; expected \[70, 3\]"):
            mlp(x, topk_idx, topk_weights[:, :2])
        with pytest.raises(ValueError, match=r"x: shape \[69, 256\]; expected \[70, 256\]"):
            mlp(x[1:], topk_idx, topk_weights)
        with pytest.raises(ValueError, match=r"x: shape \[70, 512\]; expected \[70, 256\]"):
            mlp(torch.cat((x, x), 1), topk_idx, topk_weights)
        assert torch.equal(y, _forward(x, topk_idx, topk_weights, mlp.quantized_weights())[0])
    assert not y.requires_grad and torch.equal(y, mlp(x, topk_idx, topk_weights))


def test_the_same_errors_where_calls_are_recorded(layer):
    mlp, x, topk_idx, topk_weights = layer
    for message, wrong in {
        r"topk_weights: shape \[70, 2\]; expected \[70, 3\]": (x, topk_idx, topk_weights[:, :2]),
        r"x: shape \[69, 256\]; expected \[70, 256\]": (x[1:], topk_idx, topk_weights),
        r"x: shape \[70, 512\]; expected \[70, 256\]": (torch.cat((x, x), 1), topk_idx, topk_weights),
    }.items():
        with pytest.raises(ValueError, match=message):
            mlp(*wrong)


def test_new_weights_are_quantised_again(layer):
    mlp, x, topk_idx, topk_weights = layer
    before = mlp(x, topk_idx, topk_weights)
    assert mlp.quantized_weights() is mlp.quantized_weights()
    with torch.no_grad():
        mlp.down.mul_(2)
    assert relative_error(mlp(x, topk_idx, topk_weights), 2 * before) < 0.01


def test_other_parameters_in_the_memory_of_the_old_ones():
    mlp, twin = ExpertMLP(2, 128, 128), ExpertMLP(2, 128, 128)
    inputs = torch.randn(5, 128).bfloat16(), torch.randint(0, 2, (5, 2)), torch.rand(5, 2)
    memory = {name: bytearray(w.numel() * w.element_size()) for name, w in mlp.named_parameters()}
    for _ in range(2):
        twin.load_state_dict({name: torch.randn_like(w) for name, w in twin.named_parameters()})
        for name, values in twin.named_parameters():
            setattr(mlp, name, None)
            here = torch.frombuffer(memory[name], dtype=values.dtype).view(values.shape)
            memory[name][:] = values.detach().view(torch.uint8).numpy().tobytes()
            setattr(mlp, name, torch.nn.Parameter(here))
        assert torch.equal(mlp(*inputs), twin(*inputs))


def test_views_that_begin_anywhere(layer):
    mlp, x, topk_idx, topk_weights = layer
    upstream = torch.randn_like(x)

    def gradients(x, view):
        leaf = x.detach().requires_grad_()
        y = mlp(leaf, topk_idx, topk_weights)
        return torch.autograd.grad(view(y), (leaf, topk_weights, mlp.gate_up, mlp.down), upstream)

    expected = gradients(x, lambda y: y)
    wide = torch.cat([x.new_zeros(70, 3), x.detach()], 1)[:, 3:]
    for actual in (gradients(x, behind_three_others), gradients(wide, lambda y: y)):
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_weights_made_in_inference_mode(layer):
    mlp, x, topk_idx, topk_weights = layer
    with torch.inference_mode():
        twin = ExpertMLP(5, 256, 128, device=x.device)
        twin.load_state_dict(mlp.state_dict())
        assert torch.equal(twin(x, topk_idx, topk_weights), mlp(x, topk_idx, topk_weights))


def test_compiled_without_a_break(layer):
    mlp, x, topk_idx, topk_weights = layer
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    y, grad = mlp(x, topk_idx, topk_weights), torch.randn_like(x)
    z = compiled(x, topk_idx, topk_weights)
    assert torch.equal(y, z)
    inputs = x, topk_weights, mlp.gate_up, mlp.down
    for one, other in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(z, inputs, grad), strict=True):
        assert torch.equal(one, other)


def test_one_trace_for_any_number_of_tokens(layer):
    mlp, *inputs = layer
    inputs = tuple(t.detach() for t in inputs)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(mlp, inputs, dynamic_shapes=({0: tokens},) * 3).module()
        for count in (70, 33, 2):
            some = [t[:count] for t in inputs]
            assert torch.equal(exported(*some), mlp(*some))


def test_a_graph_replays_with_other_routings(layer):
    mlp, *inputs = layer
    x, topk_idx, topk_weights = (t.detach() for t in inputs)
    if not x.is_cuda:
        pytest.skip("graphs are CUDA's")
    with torch.no_grad():
        mlp(x, topk_idx, topk_weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mlp(x, topk_idx, topk_weights)
        for _ in range(3):
            x.normal_()
            topk_idx.random_(-1, 5)
            graph.replay()
            assert torch.equal(y, mlp(x, topk_idx, topk_weights))


def test_a_graph_replays_forward_and_backward(layer):
    mlp, x, topk_idx, topk_weights = layer
    if not x.is_cuda:
        pytest.skip("graphs are CUDA's")
    inputs, upstream = (x, topk_weights, mlp.gate_up, mlp.down), torch.randn_like(x)

    def step():
        y = mlp(x, topk_idx, topk_weights)
        return y, *torch.autograd.grad(y, inputs, upstream)

    with torch.cuda.stream(torch.cuda.Stream()):  # torch wants a first backward pass outside of the capture
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.normal_(), topk_weights.uniform_(), upstream.normal_()
            topk_idx.random_(-1, 5)
        graph.replay()
        for name, ours, eager in zip(("y", "x", "topk_weights", "gate_up", "down"), captured, step(), strict=True):
            assert torch.equal(ours, eager), name


def test_a_step_learns(layer):
    mlp, x, topk_idx, topk_weights = layer
    target = torch.randn_like(x)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = (mlp(x, topk_idx, topk_weights) - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)


def test_sizes():
    with pytest.raises(ValueError, match="hidden: 100; expected a multiple of 128"):
        ExpertMLP(4, 100, 128)
    assert phalanx.nn.ExpertMLP is ExpertMLP


def test_weights_written_by_the_library_are_seen(layer):
    mlp, x, topk_idx, topk_weights = layer
    with torch.no_grad():
        before = mlp(x, topk_idx, topk_weights)
        weight = phalanx.quantize(torch.randn(256, 128, device=x.device), (128, 128))
        for expert in range(5):
            phalanx.dequantize(weight, out=mlp.down[expert])
        after = mlp(x, topk_idx, topk_weights)
    assert not torch.equal(before, after)
    fresh = ExpertMLP(5, 256, 128, device=x.device)
    fresh.load_state_dict(mlp.state_dict())
    with torch.no_grad():
        assert torch.equal(after, fresh(x, topk_idx, topk_weights))


def test_a_second_derivative_is_refused(layer):
    mlp, x, topk_idx, topk_weights = layer
    loss = mlp(x, topk_idx, topk_weights).float().pow(2).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.float().pow(2).sum().backward()


def test_pickles_hold_no_quantized_weights(layer):
    mlp, x, topk_idx, topk_weights = layer
    size = len(pickle.dumps(mlp))
    with torch.no_grad():
        y = mlp(x, topk_idx, topk_weights)
        assert len(pickle.dumps(mlp)) == size
        for other in (pickle.loads(pickle.dumps(mlp)), copy.deepcopy(mlp)):
            assert torch.equal(other(x, topk_idx, topk_weights), y)


def test_fake_tensors_leave_no_weights_behind(layer):
    from torch._subclasses import FakeTensorMode

    mlp, *tokens = layer
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert mlp(*map(mode.from_tensor, tokens)).shape == tokens[0].shape
        y = mlp(*tokens)
        assert type(y) is torch.Tensor and torch.isfinite(y).all()


@pytest.mark.parametrize("record", [False, True])
def test_wrong_tensors_are_refused_recorded_or_not(layer, record):
    mlp, x, topk_idx, topk_weights = layer
    with torch.set_grad_enabled(record):
        with pytest.raises(TypeError, match="^x: torch.float16; expected torch.bfloat16"):
            mlp(x.half(), topk_idx, topk_weights)
        with pytest.raises(ValueError, match="^topk_idx: .* expected a matrix"):
            mlp(x, topk_idx[0], topk_weights[0])
        with pytest.raises(TypeError, match="^topk_weights: expected an array, got NoneType"):
            mlp(x, topk_idx, None)
    with pytest.raises(ValueError, match="^num_experts: 513; expected 1 to 512"):
        ExpertMLP(513, 128, 128)
