"""Arrays of more than 2**32 elements: some rows of each, as they should be. Every index into them needs 64 bits.

Products are of small integers, so that sums are exact in FP32 whatever their order; what remains gives rows of large
arrays the bytes that it gives the same rows by themselves.
"""

import phalanx
import pytest

torch = pytest.importorskip("torch")

COLS = 7168
ROWS = 600_064
assert ROWS * COLS > 1 << 32
E4M3 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def memory(arrays):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 80 << 30:
        pytest.skip("less than 80 GB free")
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def integers(*shape, largest=8, dtype=E4M3):
    """As torch.randint, a piece at a time: the dtypes between need more memory than the result."""
    out = torch.empty(shape, device="cuda", dtype=dtype)
    for piece in out.view(shape[0], -1).split(1 << 16):
        piece.copy_(torch.randint(-largest, largest + 1, piece.shape, device="cuda", dtype=torch.int8))
    return out


def scales(*shape, by_columns=False):
    """Powers of two, one for a whole row."""
    rows = torch.randint(-2, 3, (*shape[:-1], 1), device="cuda").float().exp2()
    if by_columns:
        return rows.transpose(-1, -2).expand(*shape[:-2], shape[-1], shape[-2]).contiguous().transpose(-1, -2)
    return rows.expand(shape).contiguous()


def some_rows(rows, cols):
    """The first and the last, and those that have the 2**31st and 2**32nd element or byte, with their neighbours."""
    around = [(1 << power) // cols for power in range(29, 34)]
    return [row for row in (0, 1, *(r + d for r in around for d in (-1, 0, 1)), rows - 2, rows - 1) if row < rows]


def whole_blocks(rows):
    """The blocks of 128 rows that have these, and all of their rows."""
    blocks = sorted({row // 128 for row in rows})
    return blocks, [block * 128 + i for block in blocks for i in range(128)]


def take(x, rows):
    """These rows, of any dtype."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.dtype == E4M3 else x[rows]


def product(a, b):
    """A · Bᵀ in FP64, of (data, scales) or without scales."""

    def values(x, block_rows):
        if not isinstance(x, tuple):
            return x.double()
        data, scale = x
        rows, cols = data.shape
        return data.double() * scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(128, 1)[:, :cols]

    return values(a, 1) @ values(b, 128).t()


def same(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_gemm_fp8(out_dtype):
    a = integers(ROWS, COLS), scales(ROWS, COLS // 128, by_columns=True)
    b = integers(COLS, COLS), scales(COLS // 128, COLS // 128)
    rows = some_rows(ROWS, COLS)
    for batch_invariant in (False, True):
        d = phalanx.gemm_fp8(a, b, out_dtype=out_dtype, batch_invariant=batch_invariant)
        same(d[rows], product(tuple(take(x, rows) for x in a), b).to(out_dtype))
    d.fill_(1)
    phalanx.gemm_fp8(a, b, c=d, out=d)
    same(d[rows], (product(tuple(take(x, rows) for x in a), b) + 1).to(out_dtype))


@pytest.mark.parametrize("m", [1, 16, 64, 128, 300])
def test_gemm_fp8_many_columns(m):
    """B larger than 2**32, as of a vocabulary; D's columns are its rows."""
    a, b = (integers(m, COLS), scales(m, COLS // 128)), (integers(ROWS, COLS), scales(ROWS // 128, COLS // 128))
    blocks, rows = whole_blocks(some_rows(ROWS, COLS))
    d = phalanx.gemm_fp8(a, b, out_dtype=torch.float32)
    same(d[:, rows], product(a, (take(b[0], rows), b[1][blocks])).float())


def test_gemm_bf16():
    a, b = integers(ROWS, COLS, dtype=torch.bfloat16), integers(COLS, COLS, dtype=torch.bfloat16)
    rows = some_rows(ROWS, COLS)
    same(phalanx.gemm_bf16(a, b)[rows], product(a[rows], b).bfloat16())


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("form", ["offsets", "row_groups", "counts"])
def test_groups(kind, form):
    """A, B and D, each larger than 2**32."""
    groups, each = 160, 3840  # rows of A, at most, and of B
    dtype = E4M3 if kind == "fp8" else torch.bfloat16
    a, b = integers(groups * each, COLS, dtype=dtype), integers(groups, each, COLS, dtype=dtype)
    assert min(a.numel(), b.numel()) > 1 << 32
    used = torch.tensor([each if g % 3 else each - 77 for g in range(groups)], device="cuda", dtype=torch.int32)
    offsets = torch.nn.functional.pad(used.cumsum(0), (1, 0)).int()
    starts = [g * each for g in range(groups)] if form == "counts" else offsets.tolist()
    a_scales, b_scales = scales(groups * each, COLS // 128), scales(groups, each // 128, COLS // 128)
    d = torch.empty(groups * each, COLS, device="cuda", dtype=torch.bfloat16)[:, :each]  # padded rows
    if form == "counts":
        a, a_scales, d = (x.unflatten(0, (groups, each)) for x in (a, a_scales, d))
        where = used
    elif form == "offsets":
        where = offsets
    else:
        where = torch.full((groups * each,), -1, device="cuda", dtype=torch.int32)
        where[: offsets[-1]] = torch.arange(groups, device="cuda").repeat_interleave(used).int()
    suffix = {"offsets": "", "row_groups": "_indexed", "counts": "_masked"}[form]
    operation = getattr(phalanx, f"grouped_gemm_{kind}{suffix}")
    operation(*([(a, a_scales), (b, b_scales)] if kind == "fp8" else [a, b]), where, out=d)
    phalanx.check_groups(d)
    a, a_scales, d = (x.flatten(0, 1) if x.dim() == 3 else x for x in (a, a_scales, d))
    for g in (0, 1, groups // 2 - 1, groups // 2, groups - 2, groups - 1):
        rows = [starts[g], starts[g] + 1000, starts[g] + int(used[g]) - 1]
        if kind == "fp8":
            expected = product((take(a, rows), a_scales[rows]), (b[g], b_scales[g]))
        else:
            expected = product(a[rows], b[g])
        same(d[rows], expected.bfloat16())


def test_groups_swiglu():
    groups, n = 32, 2 * COLS
    each = ROWS // groups
    a = integers(ROWS, COLS, largest=2), scales(ROWS, COLS // 128, by_columns=True)
    b = integers(groups, n, COLS, largest=1), torch.full((groups, n // 128, COLS // 128), 2.0**-7, device="cuda")
    offsets = torch.arange(0, ROWS + 1, each, device="cuda", dtype=torch.int32)
    q = phalanx.grouped_gemm_fp8_swiglu(a, b, offsets)
    assert q.data.numel() > 1 << 32
    rows = some_rows(ROWS, COLS)
    gates_and_ups = torch.cat(
        [product(tuple(take(x, [r]) for x in a), (b[0][r // each], b[1][r // each])) for r in rows]
    )
    expected = phalanx.swiglu_quantize(gates_and_ups.bfloat16())
    same(take(q.data, rows), expected.data)
    same(q.scales[rows], expected.scales)


class Gradients:
    """Operands of one kind, [rows, tokens] in E4M3 and [tokens, rows] in BF16, and parts of them in FP64."""

    def __init__(self, kind, rows, tokens):
        self.is_fp8 = kind == "fp8"
        if self.is_fp8:
            data = integers(rows, tokens, largest=1)
            self.operand = data, scales(rows, -(-tokens // 128), by_columns=True)
        else:
            self.operand = integers(tokens, rows, largest=1, dtype=torch.bfloat16)

    def part(self, rows, first, last):
        if not self.is_fp8:
            return self.operand[first:last, rows].t().double()
        data, scale = self.operand
        return take(data, rows)[:, first:last].double() * scale[rows, :1].double()


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("large", ["d", "operands"])
def test_gradients(kind, large):
    """Sums stay below 2**24."""
    groups, m, n, tokens = (160, 3840, COLS, 64) if large == "d" else (2, 4096, 4096, 1 << 19)
    edges = list(range(0, groups * tokens + 1, tokens))
    if large == "operands":
        edges[-1] += 128
    a, b = Gradients(kind, m, edges[-1]), Gradients(kind, n, edges[-1])
    assert max(groups * m * n, m * edges[-1]) > 1 << 32
    d = torch.ones(groups, m, n, device="cuda")
    offsets = torch.tensor(edges, device="cuda", dtype=torch.int32)
    getattr(phalanx, f"grouped_wgrad_{kind}")(a.operand, b.operand, offsets, out=d, accumulate=True)
    rows, all_columns = [0, 1, m // 2, m - 1], list(range(n))
    for g in sorted({0, groups // 4, groups // 2 - 1, groups // 2, groups - 1}):
        of_group = edges[g], edges[g + 1]
        same(d[g][rows], (1 + a.part(rows, *of_group) @ b.part(all_columns, *of_group).t()).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize(dtype):
    x = torch.empty(ROWS, COLS, device="cuda", dtype=dtype).normal_()
    rows = some_rows(ROWS, COLS)
    blocks, of_blocks = whole_blocks(rows)
    by_rows, by_blocks = phalanx.quantize(x), phalanx.quantize(x, (128, 128))
    for q, block, at, scale_rows in ((by_rows, (1, 128), rows, rows), (by_blocks, (128, 128), of_blocks, blocks)):
        alone = phalanx.quantize(x[at], block)
        same(take(q.data, at), alone.data)
        same(q.scales[scale_rows], alone.scales)
        same(phalanx.dequantize(q, dtype=dtype)[at], phalanx.dequantize(alone, dtype=dtype))
    del by_rows, by_blocks, q
    alone = phalanx.quantize_transposed(x[of_blocks])
    for q in (phalanx.quantize_transposed(x), phalanx.quantize_both(x)[1]):
        same(q.data.view(torch.uint8)[:, of_blocks], alone.data.view(torch.uint8))
        same(q.scales[:, blocks], alone.scales)


def test_swiglu():
    """Gates and ups of more than 2**32 elements, and as much in h and its gradient."""
    x = torch.empty(ROWS, 2 * COLS, device="cuda", dtype=torch.bfloat16).normal_()
    grad = torch.empty(ROWS, COLS, device="cuda", dtype=torch.bfloat16).normal_()
    weights = torch.rand(ROWS, device="cuda")
    rows = sorted({*some_rows(ROWS, 2 * COLS), *some_rows(ROWS, COLS)})
    blocks, of_blocks = whole_blocks(rows)

    alone = phalanx.swiglu_quantize(x[rows], weights[rows])
    for q in (phalanx.swiglu_quantize(x, weights), phalanx.swiglu_quantize_both(x, weights)[0]):
        same(take(q.data, rows), alone.data)
        same(q.scales[rows], alone.scales)
    del q
    grad_x, grad_weights = phalanx.swiglu_backward(grad, x, weights)
    alone, alone_weights = phalanx.swiglu_backward(grad[rows], x[rows], weights[rows])
    same(grad_x[rows], alone)
    same(grad_weights[rows], alone_weights)
    del grad_x
    by_rows, by_columns = phalanx.swiglu_backward_both(grad, x, weights)
    alone, alone_columns = phalanx.swiglu_backward_both(grad[of_blocks], x[of_blocks], weights[of_blocks])
    same(take(by_rows.data, of_blocks), alone.data)
    same(by_columns.data.view(torch.uint8)[:, of_blocks], alone_columns.data.view(torch.uint8))
    same(by_columns.scales[:, blocks], alone_columns.scales)


@pytest.mark.parametrize("form", ["contiguous", "masked"])
def test_tokens_to_experts_and_back(form):
    """Rows of more than 2**32 elements."""
    tokens, experts, topk = 80_000, 64, 8
    max_rows = 12_000 if form == "masked" else 0
    topk_idx = torch.rand(tokens, experts, device="cuda").topk(topk).indices
    x = torch.empty(tokens, COLS, device="cuda", dtype=torch.bfloat16).normal_()
    weights = torch.rand(tokens, topk, device="cuda")
    rows, routing = phalanx.route_and_permute(x, topk_idx, experts, max_rows=max_rows)
    assert rows.numel() > 1 << 32
    flat, slots = rows.view(-1, COLS), routing.slots
    some = torch.tensor([0, 1, tokens // 2, tokens - 1], device="cuda")
    assert int(slots.max()) * COLS > 1 << 32
    for token in torch.cat([some, slots.argmax().view(1) // topk]).tolist():
        for slot in slots[token].tolist():
            same(flat[slot], x[token])
    same(phalanx.permute(x, routing).view(-1, COLS)[slots[some].flatten()], x[some.repeat_interleave(topk)])

    expected = sum(x[some].float() * weights[some, k, None] for k in range(topk))
    torch.testing.assert_close(phalanx.unpermute(rows, routing, weights, out_dtype=torch.float32)[some], expected)

    grad_rows, grad_weights = phalanx.unpermute_backward(x, routing, weights, rows)
    expected = (x[some, None].float() * weights[some, :, None]).bfloat16()
    same(grad_rows.view(-1, COLS)[slots[some].flatten()], expected.flatten(0, 1))
    expected = x[some].double().square().sum(1, keepdim=True).expand(-1, topk).float()
    torch.testing.assert_close(grad_weights[some], expected, rtol=1e-4, atol=0)

    q = phalanx.quantize(x)
    permuted = phalanx.permute(q, routing)
    data, scales_of = (t.flatten(0, 1) if form == "masked" else t for t in permuted)
    same(take(data, slots[some].flatten()), take(q.data, some.repeat_interleave(topk)))
    same(scales_of[slots[some].flatten()], q.scales[some.repeat_interleave(topk)])
