"""gemm_fp8 on the GPU: every case within its bound; streams, graphs and threads."""

import threading

import phalanx
import pytest
from cases import GemmFp8Case, random_shapes, shapes

torch = pytest.importorskip("torch")


def run(case, arrays, **options):
    inputs = case.make(arrays)
    case.run(inputs, **options)
    torch.cuda.synchronize()
    case.check(inputs)
    return inputs


def pairs(inputs):
    return (inputs.a.array, inputs.sfa.array), (inputs.b.array, inputs.sfb.array)


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).cpu()


@pytest.mark.parametrize("shape", shapes("small", "odd", "edge"), ids=str)
@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("values", ["normal", "exact", "bits", "scales"])
def test_shapes(arrays, shape, out, values):
    run(GemmFp8Case(*shape, out=out, values=values), arrays)


@pytest.mark.parametrize("shape", shapes("decode", "prefill"), ids=str)
def test_real_layers(arrays, shape):
    run(GemmFp8Case(*shape), arrays)


@pytest.mark.parametrize("out", ["bf16", "f32"])
def test_real_layers_are_exact(arrays, out):
    for shape in ((64, 2112, 7168), (4096, 2112, 7168), (128, 7168, 2048), (1024, 4096, 7168)):
        run(GemmFp8Case(*shape, out=out, values="exact"), arrays)


def test_square(arrays):
    for shape in shapes("square"):
        run(GemmFp8Case(*shape, values="exact"), arrays)


@pytest.mark.parametrize("c", ["apart", "alias"])
@pytest.mark.parametrize("out", ["bf16", "f32"])
@pytest.mark.parametrize("shape", [(130, 264, 300), (64, 2112, 1024), (1000, 520, 256), (3, 9, 2000)], ids=str)
def test_c(arrays, shape, c, out):
    run(GemmFp8Case(*shape, out=out, c=c), arrays)


def varied(i, seed, shape):
    """The i-th of many cases: outputs, C, layouts, padding and values in turn."""
    return GemmFp8Case(
        *shape,
        out=("bf16", "f32")[i % 2],
        c=("none", "none", "apart", "alias")[i // 2 % 4],
        sfa_layout=("mn", "k")[i // 3 % 2],
        pad=i % 5,
        values=("normal", "bits", "exact")[i % 3],
        seed=seed,
    )


def test_random_shapes(arrays, seed):
    for i, shape in enumerate(random_shapes(400, seed, 1500)):
        run(varied(i, seed, shape), arrays)


@pytest.mark.parametrize("rows", [1, 5, 8, 16])
@pytest.mark.parametrize("shape", shapes("decode"), ids=str)
def test_constant_weights(arrays, shape, rows):
    for sfa_layout in ("mn", "k"):
        run(GemmFp8Case(rows, *shape[1:], sfa_layout=sfa_layout), arrays, constant_b=True)


def test_constant_weights_of_random_shapes(arrays, seed):
    for i, (m, n, k) in enumerate(random_shapes(120, seed, 9000)):
        run(varied(i, seed, (1 + m % 16, n, 1 + k % 3000)), arrays, constant_b=True)


def test_constant_weights_beside_late_activations(arrays):
    """Each product's kernel begins while the one that writes its A still runs, and A is another one each time."""
    cases = [GemmFp8Case(7, 4096, 7168, values="exact", seed=seed) for seed in range(6)]
    made = [case.make(arrays) for case in cases]
    (_, sfa), b = pairs(made[0])
    a = torch.empty_like(made[0].a.array)
    expected = [phalanx.gemm_fp8((inputs.a.array, sfa), b) for inputs in made]
    outs = [torch.empty_like(expected[0]) for _ in range(120)]
    phalanx.gemm_fp8((a, sfa), b, constant_b=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(60):
            a.view(torch.uint8).copy_(made[i % 6].a.array.view(torch.uint8))
            phalanx.gemm_fp8((a, sfa), b, out=outs[2 * i], constant_b=True)
            phalanx.gemm_fp8((a, sfa), b, out=outs[2 * i + 1], constant_b=True)  # behind one of its own kind
    for _ in range(5):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for i, out in enumerate(outs):
            assert torch.equal(bits(out), bits(expected[i // 2 % 6])), i


@pytest.mark.parametrize("num_sms", [1, 2, 17, 78, 131, 1000])
def test_num_sms(arrays, num_sms):
    run(GemmFp8Case(500, 1024, 512, values="exact"), arrays, num_sms=num_sms)


def test_nan_reaches_what_it_takes_part_in(arrays):
    case = GemmFp8Case(200, 300, 500, "f32")
    inputs = case.make(arrays)
    inputs.a.array.view(torch.uint8)[1, 400] = 0x7F
    inputs.b.array.view(torch.uint8)[299, 0] = 0xFF
    inputs.sfa.array[130, 2] = float("nan")
    case.run(inputs)
    case.check(inputs)
    assert int(inputs.out.array.isnan().sum()) == 300 + 300 + 198


@pytest.mark.parametrize("shape", [(64, 2112, 7168), (1024, 1536, 2048), (1, 4096, 7168)], ids=str)
def test_same_bits_each_time(arrays, shape):
    inputs = GemmFp8Case(*shape).make(arrays)
    a, b = pairs(inputs)
    expected = bits(phalanx.gemm_fp8(a, b))
    for _ in range(30):
        assert torch.equal(bits(phalanx.gemm_fp8(a, b)), expected)


# --- where and when it runs ------------------------------------------------------------------------------------------


def test_current_stream(arrays):
    """The work waits for what the stream holds: its inputs are written late, on that stream only."""
    case = GemmFp8Case(300, 512, 1024, values="exact")
    inputs = case.make(arrays)
    late = inputs.a.array.clone()
    inputs.a.array.view(torch.uint8).zero_()
    phalanx.gemm_fp8(*pairs(inputs))  # compiled, so that the next call is not slow itself
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        inputs.a.array.view(torch.uint8).copy_(late.view(torch.uint8))
        case.run(inputs)
    assert not stream.query(), "the call waited for the stream"
    stream.synchronize()
    case.check(inputs)


def test_graph_replays_with_new_inputs(arrays):
    first, second = (GemmFp8Case(128, 2112, 1024, c="apart", seed=seed) for seed in (1, 2))
    inputs, new = first.make(arrays), second.make(arrays)
    first.run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.run(inputs)
    for name in ("a", "sfa", "b", "sfb", "c"):
        getattr(inputs, name).memory.copy_(getattr(new, name).memory)
    inputs.c_before = new.c_before
    inputs.out.memory.fill_(0xFF)
    graph.replay()
    torch.cuda.synchronize()
    second.check(inputs)


def test_quantize_and_gemm_in_one_graph(arrays):
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    b = phalanx.quantize(torch.randn(512, 1024, device="cuda"), (128, 128))
    phalanx.gemm_fp8(phalanx.quantize(x), b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        d = phalanx.gemm_fp8(phalanx.quantize(x), b)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(bits(d), bits(phalanx.gemm_fp8(phalanx.quantize(x), b)))


def test_many_threads_each_with_a_stream(arrays):
    cases = [GemmFp8Case(64 + 32 * i, 512 + 8 * i, 768, seed=i, values="exact") for i in range(8)]
    made = [case.make(arrays) for case in cases]
    failures = []

    def work(case, inputs):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(20):
                    inputs.out.memory.fill_(0xFF)
                    case.run(inputs)
            stream.synchronize()
            case.check(inputs)
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, made, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu_than_the_current_one(arrays):
    from cases import TorchArrays

    run(GemmFp8Case(100, 256, 512), TorchArrays("cuda:1"))
    assert torch.cuda.current_device() == 0


def test_mixed_devices(arrays):
    inputs = GemmFp8Case(8, 128, 128).make(arrays)
    (a, sfa), (b, sfb) = pairs(inputs)
    with pytest.raises(ValueError, match=r"b\.data.*device of a\.data"):
        phalanx.gemm_fp8((a, sfa), (b.cpu(), sfb))
    with pytest.raises(ValueError, match=r"a\.scales.*device of a\.data"):
        phalanx.gemm_fp8((a, sfa.cpu()), (b, sfb))
    with pytest.raises(ValueError, match=r"d is.*device of a\.data"):
        phalanx.gemm_fp8((a, sfa), (b, sfb), out=inputs.out.array.cpu())


def test_compile(arrays):
    b = phalanx.quantize(torch.randn(264, 512, device="cuda"), (128, 128))
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)

    def layer(x):
        return phalanx.gemm_fp8(phalanx.quantize(torch.relu(x)), b) * 2

    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(bits(compiled(x)), bits(layer(x)))
    assert torch.equal(bits(compiled(x[:40])), bits(layer(x[:40])))
