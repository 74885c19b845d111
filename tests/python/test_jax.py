"""JAX on the CPU."""

import os
import subprocess
import sys

import numpy as np
import phalanx
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    return rng.standard_normal((33, 272), np.float32), rng.standard_normal((264, 272), np.float32)


def test_the_same_bits_as_numpy(operands):
    x, w = operands
    expected = phalanx.gemm_fp8(phalanx.quantize(x), phalanx.quantize(w, (128, 128)))
    a, b = phalanx.quantize(jnp.asarray(x)), phalanx.quantize(jnp.asarray(w), (128, 128))
    d = phalanx.gemm_fp8(a, b)
    assert isinstance(d, jax.Array) and d.dtype == jnp.bfloat16 and a.data.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(d).view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(phalanx.dequantize(a), phalanx.dequantize(phalanx.quantize(x)))


def test_inputs_still_being_computed(operands):
    x, w = map(jnp.asarray, operands)
    b = phalanx.quantize(w, (128, 128))
    y = x
    for _ in range(50):
        y = y @ jnp.eye(272)
    d = phalanx.gemm_fp8(phalanx.quantize(y), b, out_dtype=jnp.float32)
    np.testing.assert_array_equal(d, phalanx.gemm_fp8(phalanx.quantize(x), b, out_dtype=jnp.float32))


def test_columns_one_after_another(operands):
    layouts = pytest.importorskip("jax.experimental.layout")
    x = jnp.asarray(operands[0])
    older = hasattr(layouts, "DeviceLocalLayout")  # before 0.7
    if older:
        by_columns = layouts.Layout(layouts.DeviceLocalLayout((1, 0)), x.sharding)
    else:
        by_columns = layouts.Format(layouts.Layout((1, 0)), x.sharding)
    a, b = phalanx.quantize(x), phalanx.quantize(jnp.asarray(operands[1]), (128, 128))
    turned = jax.device_put(a.scales, by_columns), jax.device_put(b.scales, by_columns)  # scales have any strides
    layout = turned[0].layout.device_local_layout if older else turned[0].format.layout
    assert layout.major_to_minor == (1, 0)
    d = phalanx.gemm_fp8((a.data, turned[0]), (b.data, turned[1]), out_dtype=jnp.float32)
    np.testing.assert_array_equal(d, phalanx.gemm_fp8(a, b, out_dtype=jnp.float32))
    with pytest.raises(ValueError, match="x is .*column stride"):
        phalanx.quantize(jax.device_put(x, by_columns))


def test_c_stays_as_it_is(operands):
    x, w = map(jnp.asarray, operands)
    a, b = phalanx.quantize(x), phalanx.quantize(w, (128, 128))
    c = jnp.ones((33, 264), jnp.float32)
    d = phalanx.gemm_fp8(a, b, c=c)
    np.testing.assert_allclose(d, phalanx.gemm_fp8(a, b, out_dtype=jnp.float32) + 1, atol=1e-4)
    assert (c == 1).all()


def test_errors(operands):
    x, w = map(jnp.asarray, operands)
    a, b = phalanx.quantize(x), phalanx.quantize(w, (128, 128))
    with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
        phalanx.gemm_fp8(a, b, out=jnp.zeros((33, 264), jnp.bfloat16))
    with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
        phalanx.dequantize(a, out=x)
    with pytest.raises(ValueError, match="gates_and_ups: JAX arrays are immutable"):
        offsets, room = jnp.array([0, 33], jnp.int32), jnp.zeros((33, 256), jnp.bfloat16)
        weights = phalanx.quantize(w[:256], (128, 128))
        stack = weights.data[None], weights.scales[None]
        phalanx.grouped_gemm_fp8_swiglu(a, stack, offsets, gates_and_ups=room)
    with pytest.raises(TypeError, match=r"jax\.jit"):
        jax.jit(phalanx.check_groups)(x)
    with pytest.raises(TypeError, match=r"c: traced by jax\.grad or vmap"):
        jax.grad(lambda c: phalanx.gemm_fp8(a, b, c).sum())(jnp.zeros((33, 264), jnp.bfloat16))
    with pytest.raises(TypeError, match=r"a\.scales: expected an array"):
        phalanx.gemm_fp8((a.data, None), b)
    with pytest.raises(ValueError, match=r"d is .*row stride is .*multiple of 16"):
        phalanx.gemm_fp8(a, phalanx.quantize(w[:257], (128, 128)))


def test_arrays_of_other_libraries_are_refused(operands):
    x, w = operands
    a, b = phalanx.quantize(x), phalanx.quantize(w, (128, 128))
    out = jnp.zeros((33, 264))
    with pytest.raises(TypeError, match="an array of jaxlib; expected one of NumPy"):
        phalanx.gemm_fp8(a, b, out=out)
    with pytest.raises(TypeError, match="b.data: an array of numpy; expected one of JAX"):
        phalanx.gemm_fp8(phalanx.quantize(jnp.asarray(x)), b)
    assert (out == 0).all()
    torch = pytest.importorskip("torch")
    a, b = (phalanx.quantize(torch.from_numpy(y), block) for y, block in ((x, (1, 128)), (w, (128, 128))))
    with pytest.raises(TypeError, match="an array of jaxlib; expected one of PyTorch"):
        phalanx.gemm_fp8(a, b, out=out)
    assert (out == 0).all()


def same(actual, expected):
    """Bit for bit, of arrays or tuples of them."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.fixture
def jit():
    pytest.importorskip("jax_tvm_ffi")
    return jax.jit


def test_jit_gives_the_bits_of_eager_calls(jit, operands):
    def layer(x, b, c):
        a = phalanx.quantize(x)
        d = phalanx.gemm_fp8(a, b)
        e = phalanx.gemm_fp8(a, b, c=c, num_sms=64, batch_invariant=True)
        return a, d, e, phalanx.gemm_fp8(a, b, out_dtype=jnp.float32)

    x, w = map(jnp.asarray, operands)
    b, c = phalanx.quantize(w, (128, 128)), jnp.ones((33, 264), jnp.float32)
    compiled = jit(layer)
    same(compiled(x, b, c), layer(x, b, c))
    same(compiled(x + 1, b, c), layer(x + 1, b, c))
    same(jit(layer)(x[:0], b, c[:0]), layer(x[:0], b, c[:0]))
    rows = phalanx.quantize(x)  # eager calls make scales row-major
    same(jit(phalanx.gemm_fp8)(rows, b), phalanx.gemm_fp8(rows, b))


@pytest.mark.parametrize("pow2", [False, True])
def test_jit_of_quantisation(jit, operands, pow2):
    def all_forms(x):
        rows, blocks = (phalanx.quantize(x, block, pow2_scales=pow2) for block in ((1, 128), (128, 128)))
        across = phalanx.quantize_transposed(x, pow2_scales=pow2), phalanx.quantize_both(x, pow2_scales=pow2)
        return rows, blocks, across, phalanx.dequantize(rows), phalanx.dequantize(blocks, dtype=jnp.bfloat16)

    x = jnp.asarray(operands[0])[:32]  # of a transpose, columns are rows, which the 16-byte rule is about
    same(jit(all_forms)(x), all_forms(x))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_jit_of_groups(jit, limit):
    rng = np.random.default_rng(1)

    def new(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    def layer(x, weights, b, offsets, counts):
        a = phalanx.quantize(x)
        d = phalanx.grouped_gemm_fp8(a, b, offsets)
        row_groups = jnp.searchsorted(offsets, jnp.arange(len(x)), side="right").astype(jnp.int32) - 1
        e = phalanx.grouped_gemm_fp8_indexed(a, b, row_groups, out_dtype=jnp.float32, expected_rows=16)
        stack = a.data.reshape(3, -1, a.data.shape[1]), a.scales.reshape(3, -1, a.scales.shape[1])
        return d, e, phalanx.grouped_gemm_fp8_masked(stack, b, counts), phalanx.swiglu_quantize(d, weights, limit=limit)

    x, offsets, counts = new(60, 272), jnp.array([0, 33, 33, 60], jnp.int32), jnp.array([20, 20, 20], jnp.int32)
    stack = [phalanx.quantize(new(256, 272), (128, 128)) for _ in range(3)]
    b = tuple(jnp.stack([getattr(one, field) for one in stack]) for field in ("data", "scales"))
    operands = x, jnp.arange(60, dtype=jnp.float32), b, offsets, counts
    same(jit(layer)(*operands), layer(*operands))
    same(jit(phalanx.swiglu_quantize)(x[:, :256]), phalanx.swiglu_quantize(x[:, :256]))
    with pytest.raises((ValueError, RuntimeError), match=r"offsets"):
        jit(layer)(*operands[:3], offsets[::-1], counts)[0].block_until_ready()
    with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
        jit(lambda a: phalanx.grouped_gemm_fp8(a, b, offsets, out=x))(phalanx.quantize(x))


def test_jit_of_gradients(jit):
    rng = np.random.default_rng(2)
    grad, x, up = (jnp.asarray(rng.standard_normal((64, n)), jnp.bfloat16) for n in (48, 272, 96))
    offsets, weights = jnp.array([0, 16, 16, 64], jnp.int32), jnp.arange(64, dtype=jnp.float32)

    def backward(grad, x, up, weights, offsets):
        by_token = phalanx.quantize_transposed(grad), phalanx.quantize_transposed(x)
        products = phalanx.wgrad_fp8(*by_token), phalanx.grouped_wgrad_fp8(*by_token, offsets)
        swiglu = phalanx.swiglu_backward(grad, up, weights, limit=1.5), phalanx.swiglu_backward(grad, up)
        both = phalanx.swiglu_backward_both(grad, up, weights), phalanx.swiglu_quantize_both(up, interleaved=True)
        return products, phalanx.grouped_wgrad_bf16(grad, x, offsets), swiglu, both

    arguments = grad, x, up, weights, offsets
    same(jit(backward)(*arguments), backward(*arguments))


@pytest.mark.parametrize("max_rows", [0, 40])
def test_jit_of_experts(jit, max_rows):
    """From tokens to experts, through their products, and back; forward and backward."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((24, 256)), jnp.bfloat16)
    topk_idx, weights = jnp.asarray(rng.integers(-1, 4, (24, 2))), jnp.asarray(rng.random((24, 2)), jnp.float32)
    stack = [phalanx.quantize(jnp.asarray(rng.standard_normal((256, 256)), jnp.bfloat16), (128, 128)) for _ in range(4)]
    b = tuple(jnp.stack([getattr(one, field) for one in stack]) for field in ("data", "scales"))
    plain = jnp.asarray(rng.standard_normal((4, 256, 256)), jnp.bfloat16)

    def layer(x, topk_idx, weights, b, plain):
        routing = phalanx.route(topk_idx, 4, max_rows=max_rows)
        rows = phalanx.permute(phalanx.quantize(x), routing)
        tokens, again = phalanx.route_and_permute(x, topk_idx, 4, max_rows=max_rows)
        if max_rows:
            d = phalanx.grouped_gemm_fp8_masked(rows, b, routing.counts)
            e = phalanx.grouped_gemm_bf16_masked(tokens, plain, again.counts)
            h = rows.data  # of rows that no token has, what a product leaves is undefined
        else:
            d = phalanx.grouped_gemm_fp8(rows, b, routing.offsets)
            e = phalanx.grouped_gemm_bf16(tokens, plain, again.offsets)
            h = phalanx.grouped_gemm_fp8_swiglu(rows, b, routing.offsets).data[: routing.needed.shape[0]]
        y = phalanx.unpermute(d, routing, weights, residual=x), phalanx.unpermute(e, again)
        grads = phalanx.unpermute_backward(x, routing, weights, rows=tokens), phalanx.unpermute_backward(x, again)
        return routing, rows, tokens, h, y, grads

    arguments = x, topk_idx, weights, b, plain
    same(jit(layer)(*arguments), layer(*arguments))
    same(jit(phalanx.gemm_bf16)(x, plain[0]), phalanx.gemm_bf16(x, plain[0]))


def test_jit_of_constants(jit, operands):
    """Arrays that the function closes over are not traced."""
    x, w = map(jnp.asarray, operands)
    a, b = phalanx.quantize(x), phalanx.quantize(w, (128, 128))
    expected = phalanx.gemm_fp8(a, b)
    same(jit(lambda x: phalanx.gemm_fp8(phalanx.quantize(x), phalanx.quantize(w, (128, 128))))(x), expected)
    same(jit(lambda b: phalanx.gemm_fp8(a, b))(b), expected)
    same(jit(lambda y: y + phalanx.gemm_fp8(a, b))(jnp.zeros_like(expected)), expected)


@pytest.mark.parametrize("max_rows", [0, 30])
def test_routings_are_transformed(jit, max_rows):
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((24, 256)), jnp.bfloat16)
    topk_idx = jnp.asarray(rng.integers(0, 4, (24, 2)))
    routing = phalanx.route(topk_idx, 4, max_rows=max_rows)
    rows = phalanx.permute(x, routing)
    assert jit(lambda i: phalanx.route(i, 4, max_rows=max_rows))(topk_idx).max_rows == max_rows
    same(jit(phalanx.permute)(x, routing), rows)
    same(jit(phalanx.unpermute_backward)(x, routing), phalanx.unpermute_backward(x, routing))
    kept = jax.checkpoint(lambda x, i: phalanx.permute(x, phalanx.route(i, 4, max_rows=max_rows)))
    same(jit(kept)(x, topk_idx), rows)

    def there_and_back(carry, _):
        x, routing = carry
        return (phalanx.unpermute(phalanx.permute(x, routing), routing), routing), None

    (y, _), _ = jax.lax.scan(there_and_back, (x, routing), None, length=2)
    for _ in range(2):
        x = phalanx.unpermute(phalanx.permute(x, routing), routing)
    same(y, x)


def test_threads_that_jit_first_together(operands):
    """In a process of its own, as the first call of all registers the custom call."""
    code = """if True:
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier
        import jax, jax.numpy as jnp, phalanx
        barrier = Barrier(4)
        def work(i):
            barrier.wait()
            return jax.jit(lambda x: phalanx.quantize(x * i))(jnp.ones((4, 128), jnp.bfloat16)).data.shape
        with ThreadPoolExecutor(4) as threads:
            print(set(threads.map(work, range(4))))
    """
    pytest.importorskip("jax_tvm_ffi")
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True)
    assert run.returncode == 0 and b"{(4, 128)}" in run.stdout, run.stderr.decode()


def test_results_are_as_free_to_move_as_operands(operands):
    x = jnp.asarray(operands[0])
    assert not phalanx.quantize(x).data.committed
    assert phalanx.quantize(jax.device_put(x, jax.devices("cpu")[0])).data.committed


def test_expert_parallel_writes_no_arrays():
    (group,) = phalanx.Group.local(1)
    ep = phalanx.ExpertParallel(group, hidden=128, num_experts=4, topk=2, max_tokens=8, dtype="bf16")
    x, topk_idx = jnp.ones((8, 128), jnp.bfloat16), jnp.zeros((8, 2), jnp.int32)
    dispatched = ep.dispatch(x, topk_idx, capacity=16)
    with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
        ep.dispatch(x, topk_idx, out=dispatched)
    with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
        ep.dispatch_send(x, topk_idx, capacity=16, out=dispatched)
    out = jnp.zeros((8, 128), jnp.bfloat16)
    for combine in (ep.combine, ep.combine_send):
        with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
            combine(dispatched.rows, dispatched.handle, tokens=8, out=out)
    same(ep.combine(dispatched.rows, dispatched.handle, tokens=8), 2 * x)


def test_errors_under_jit(jit, operands):
    x, w = map(jnp.asarray, operands)
    a, b = phalanx.quantize(x), phalanx.quantize(w, (128, 128))
    with pytest.raises((ValueError, RuntimeError), match=r"a\.scales is f32 \[33\].*expected 2"):
        jit(phalanx.gemm_fp8)((a.data, a.scales[:, 0]), b).block_until_ready()
    with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
        jit(lambda x: phalanx.quantize(x, out=a))(x)
    with pytest.raises((ValueError, RuntimeError), match=r"a\.scales is f32 \[5, 3\].*expected shape \[33, 3\]"):
        jit(phalanx.gemm_fp8)((a.data, a.scales[:5]), b).block_until_ready()
    same(jit(phalanx.gemm_fp8)(a, b), phalanx.gemm_fp8(a, b))  # as if nothing had been
