"""Tokens to their experts and back on the CPU."""

import ml_dtypes
import numpy as np
import phalanx
import pytest
from cases import random_moe_cases
from cases.moe import EDGES


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(arrays, case):
    case.run_and_check(arrays)


def test_random(arrays, seed):
    for case in random_moe_cases(30, seed, tokens=100, hidden=500):
        case.run_and_check(arrays)


def test_new_arrays():
    topk_idx = np.array([[1, 0], [1, -1], [1, 1]])
    x = np.arange(3 * 16, dtype=np.float32).reshape(3, 16)
    routing = phalanx.route(topk_idx, 3, alignment=4)
    assert routing.counts.tolist() == [1, 4, 0] and routing.offsets.tolist() == [0, 4, 8, 8]
    assert routing.slots.tolist() == [[4, 0], [5, -1], [6, 7]] and routing.needed.tolist() == [8]
    assert routing.sources.tolist() == [1, -1, -1, -1, 0, 2, 4, 5, *[-1] * (routing.sources.size - 8)]
    rows = phalanx.permute(x, routing)
    assert (rows[4:8] == x[[0, 1, 2, 2]]).all() and (rows[1:4] == 0).all()
    assert (phalanx.unpermute(rows, routing) == x * [[2], [1], [2]]).all()

    q = phalanx.quantize(x.astype(ml_dtypes.bfloat16))
    (data, scales), masked = phalanx.route_and_permute(q, topk_idx, 3, max_rows=2)
    assert data.shape == (3, 2, 16) and scales.shape == (3, 2, 1) and scales.strides == (16, 4, 16)
    assert masked.max_rows == 2 and masked.counts.tolist() == [1, 2, 0] and masked.needed.tolist() == [4]
    assert masked.slots.tolist() == [[2, 0], [3, -1], [-1, -1]]


@pytest.mark.parametrize(
    "change, error, parts",
    [
        ({"topk_idx": np.zeros((3, 2), np.float32)}, TypeError, ["topk_idx", "int32 or int64"]),
        ({"topk_idx": np.zeros((3, 33), np.int32)}, ValueError, ["topk_idx", "33", "at most 32"]),
        ({"topk_idx": np.zeros(3, np.int32)}, ValueError, ["topk_idx", "matrix"]),
        ({"num_experts": 0}, ValueError, ["num_experts", "1 to 1024"]),
        ({"num_experts": 1 << 40}, ValueError, ["num_experts", "1 to 1024"]),
        ({"alignment": 1 << 31}, ValueError, ["alignment", "1 to 65536"]),
        ({"capacity": 2.5}, TypeError, ["capacity", "integer"]),
        ({"num_experts": 2.0}, TypeError, ["num_experts", "2.0", "an integer"]),
        ({"alignment": 2.5}, TypeError, ["alignment", "2.5", "an integer"]),
        ({"num_experts": 1025}, ValueError, ["1025", "1 to 1024"]),
        ({"alignment": 0}, ValueError, ["alignment", "0"]),
        ({"alignment": 8, "max_rows": 4}, ValueError, ["alignment", "masked"]),
        ({"capacity": -1}, ValueError, ["capacity", "-1"]),
        ({"max_rows": -1}, ValueError, ["max_rows", "-1"]),
        ({"capacity": 5, "max_rows": 4}, ValueError, ["capacity", "max_rows"]),
    ],
)
def test_route_errors(change, error, parts):
    with pytest.raises(error) as info:
        phalanx.route(**{"topk_idx": np.zeros((3, 2), np.int32), "num_experts": 4} | change)
    assert all(part in str(info.value) for part in parts), info.value


def test_rows_apart_from_what_routing_reads():
    memory = np.zeros((8, 16), np.float32)
    topk_idx = memory.view(np.int32)[:2, :2]
    with pytest.raises(ValueError, match="rows is.*overlaps that of topk_idx"):
        phalanx.route_and_permute(np.ones((2, 16), np.float32), topk_idx, 2, out=memory[:4])


def test_errors_of_rows():
    routing = phalanx.route(np.zeros((3, 2), np.int32), 4)
    x, rows, weights = np.ones((3, 8), np.float32), np.ones((6, 8), np.float32), np.ones((3, 2), np.float32)
    phalanx.unpermute(phalanx.permute(x, routing, out=rows), routing, weights)
    bad = {
        "x": lambda: phalanx.permute(x[:2], routing),
        "rows": lambda: phalanx.permute(x, routing, out=rows[:5]),
        "rows.scales": lambda: phalanx.permute(
            phalanx.quantize(np.ones((3, 16), np.float32)),
            routing,
            out=(np.zeros((6, 16), ml_dtypes.float8_e4m3fn), np.zeros((6, 2), np.float32)),
        ),
        "multiple of 4": lambda: phalanx.permute(np.ones((3, 9), np.float32), routing),
        "options.weights": lambda: phalanx.unpermute(rows, routing, weights[:, :1]),
        "options.residual": lambda: phalanx.unpermute(rows, routing, residual=x[:2]),
        "overlaps": lambda: phalanx.unpermute(rows, routing, out=rows[:3]),
        "grad_out": lambda: phalanx.unpermute_backward(x[:2], routing),
    }
    for part, call in bad.items():
        with pytest.raises(ValueError) as info:
            call()
        assert part in str(info.value), info.value
    with pytest.raises(TypeError, match="routing: expected a Routing, got NoneType"):
        phalanx.permute(x, None)
    with pytest.raises(TypeError, match="out: expected a Quantized or a pair"):
        phalanx.permute(phalanx.quantize(np.ones((3, 16), np.float32)), routing, out=rows)
    with pytest.raises(TypeError, match="out: a pair; expected one array"):
        phalanx.permute(x, routing, out=(rows, rows))
    with pytest.raises(TypeError, match="zero_padding: expected True or False"):
        phalanx.permute(x, routing, zero_padding="no")


def test_scales_of_masked_rows_lie_anywhere_but_on_each_other():
    topk_idx, x = np.array([[0], [1], [0], [1]]), np.random.default_rng(0).standard_normal((4, 256), np.float32)
    q, routing = phalanx.quantize(x), phalanx.route(topk_idx, 2, max_rows=2)
    expected = phalanx.permute(q, routing)
    data, memory = np.zeros_like(expected[0]), np.zeros(64, np.float32)

    def scales(*strides):
        return np.lib.stride_tricks.as_strided(memory[32:], (2, 2, 2), [4 * stride for stride in strides])

    for strides in [(4, 2, 1), (2, 1, 4), (1, 2, 4), (4, 1, 2), (1, 4, 2)]:  # experts, rows, columns in any order
        phalanx.permute(q, routing, out=(data, scales(*strides)))
        np.testing.assert_array_equal(scales(*strides), expected[1])
    for strides in [(1, -2, -1), (2, 2, 1), (3, 2, 1), (4, 1, 3)]:
        with pytest.raises(ValueError, match="overlap|strides"):
            phalanx.permute(q, routing, out=(data, scales(*strides)))
