"""swiglu_quantize and swiglu_backward on the CPU, against FP64."""

import random

import numpy as np
import phalanx
import pytest
from cases import SwigluCase
from cases.swiglu import random_swiglu_case, swiglu_cases

SIZES = [(0, 128), (1, 1), (3, 128), (130, 300), (33, 1030)]


def run(case, arrays):
    inputs = case.make(arrays)
    case.check(inputs, case.run(inputs))
    if case.dtype == "bf16":
        case.check_both(inputs)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_fp64(arrays, size, dtype):
    for case in swiglu_cases(*size, dtype):
        run(case, arrays)


def test_random_cases(arrays, seed):
    rng = random.Random(seed)
    for _ in range(60):
        run(random_swiglu_case(rng, 300, seed), arrays)


def activation(gate, up, **options):
    """Of one gate and up, as dequantised."""
    return float(phalanx.dequantize(phalanx.swiglu_quantize(np.array([[gate, up]], np.float32), **options))[0, 0])


def test_edges_by_hand():
    assert activation(0.0, 5.0) == 0
    assert activation(100.0, 2.0) == 200
    assert activation(np.inf, 2.0) == 448 * 2.0**-126  # the scale of a block without finite elements
    assert np.isnan(activation(np.nan, 1.0)) and np.isnan(activation(1.0, np.nan))
    assert np.isnan(activation(np.nan, 1.0, limit=2)) and np.isnan(activation(1.0, np.nan, limit=2))
    assert abs(activation(-np.inf, 1.0)) < 2e-33 and abs(activation(-1e30, 1.0)) < 2e-33
    assert activation(50.0, -100.0, limit=30) == pytest.approx(-900, rel=1e-6)
    assert activation(50.0, 100.0, weights=np.array([0.5], np.float32)) == pytest.approx(2500, rel=1e-6)


def test_gradient_where_a_limit_cuts():
    x = np.array([[3.0, -30.0, 1.0, 1.0, 2.0, 0.5, -4.0, 4.0]], np.float32)  # gates, then ups
    grad_x, grad_weights = phalanx.swiglu_backward(np.ones((1, 4), np.float32), x, limit=2.0)
    assert grad_weights is None
    assert grad_x[0, 0] == 0 and (grad_x[0, 1:4] != 0).all()  # only gates above are cut
    assert (grad_x[0, 6:] == 0).all() and (grad_x[0, 4:6] != 0).all()  # ups at the limit are not


def test_in_place(arrays):
    case = SwigluCase(20, 200, "bf16", weighted=True)
    inputs = case.make(arrays)
    case.run(inputs)
    phalanx.swiglu_backward(inputs.grad.array, inputs.x.array, inputs.weights.array[0], out=inputs.x.array)
    left, right = (arrays.to_numpy(m.array).view(np.uint16) for m in (inputs.x, inputs.grad_x))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((4, 33), np.float32)}, ValueError, "x is f32 [4, 33]"),
        ({"x": np.zeros((4, 40), np.float32), "interleaved": True}, ValueError, "expected a multiple of 16"),
        ({"x": np.zeros((4, 32), np.float64)}, TypeError, "float64"),
        ({"limit": 0.0}, ValueError, "options.limit is 0"),
        ({"limit": float("nan")}, ValueError, "options.limit is nan"),
        ({"weights": np.zeros(3, np.float32)}, ValueError, "options.weights is f32 [3]"),
        ({"weights": np.zeros(4, np.float16)}, TypeError, "options.weights is f16"),
        ({"out": (np.zeros((4, 16), np.uint8), np.zeros((4, 1), np.float32))}, TypeError, "uint8"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": np.zeros((4, 32), np.float32)} | change
    with pytest.raises(error) as caught:
        phalanx.swiglu_quantize(**arguments)
    assert message in str(caught.value)


def test_errors_of_the_gradient():
    x = np.zeros((4, 32), np.float32)
    for grad, error, message in (
        (np.zeros((4, 15), np.float32), ValueError, "grad is f32 [4, 15]"),
        (np.zeros((4, 16), np.float16), TypeError, "grad is f16"),
        (x[:, :16], ValueError, "grad_x"),
    ):
        with pytest.raises(error) as caught:
            phalanx.swiglu_backward(grad, x, out=x)
        assert message in str(caught.value)


def test_torch_operators():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, n, generator=generator).bfloat16() for n in (64, 32))
    weights = torch.rand(5, generator=generator)
    operators = torch.ops.phalanx
    for operator, arguments in (
        (operators.quantize_transposed, (x, False)),
        (operators.quantize_both, (x, True)),
        (operators.swiglu_quantize, (x, weights, 2.0, False, False)),
        (operators.swiglu_quantize_both, (x, None, 2.0, True, False)),
        (operators.swiglu_backward, (grad, x, weights, 2.0, False)),
        (operators.swiglu_backward, (grad, x, None, 2.0, False)),
        (operators.swiglu_backward_both, (x, grad, None, 2.0, True, False)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_traced_calls_are_operators():
    torch = pytest.importorskip("torch")

    def chain(x, grad, weights):
        q = phalanx.swiglu_quantize(x, weights, limit=2.0)
        rows, transposed = phalanx.swiglu_quantize_both(x)
        grad_x, grad_weights = phalanx.swiglu_backward(grad, x, weights)
        both = phalanx.swiglu_backward_both(grad, x)
        wide = phalanx.quantize_both(grad_x), phalanx.quantize_transposed(grad_x)
        return (*q, *rows, *transposed, grad_x, grad_weights, *both[0], *both[1], *wide[0][0], *wide[0][1], *wide[1])

    x, grad, weights = torch.randn(5, 64).bfloat16(), torch.randn(5, 32).bfloat16(), torch.rand(5)
    traced = torch.compile(chain, backend="eager", fullgraph=True)(x, grad, weights)
    for actual, expected in zip(traced, chain(x, grad, weights), strict=True):
        assert (
            torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
            if actual.element_size() == 1
            else (torch.equal(actual, expected))
        )
