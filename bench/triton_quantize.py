"""Quantisation and SwiGLU in Triton, as a user would write them: peers for bench/quantize.py. BF16 in, FP32 scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _encode(x, amax):
    scale = tl.maximum(amax / 448.0, 1e-37)
    return (x * (1.0 / scale)).to(tl.float8e4nv), scale


@triton.jit
def _rows(x, q, scales, num_rows, num_cols, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row[:, None].to(tl.int64) * num_cols + col[None, :]
    inside = (row < num_rows)[:, None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    code, scale = _encode(v, tl.max(tl.abs(v), 1)[:, None])
    tl.store(q + at, code, mask=inside)
    tl.store(scales + tl.program_id(1) * num_rows + row[:, None], scale, mask=inside)


@triton.jit
def _blocks(x, q, scales, num_rows, num_cols):
    row, col = tl.program_id(0) * 128 + tl.arange(0, 128), tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row[:, None].to(tl.int64) * num_cols + col[None, :]
    inside = (row < num_rows)[:, None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    code, scale = _encode(v, tl.max(tl.abs(v)))
    tl.store(q + at, code, mask=inside)
    tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def _columns(x, q, scales, q_t, scales_t, num_rows, num_cols, COLS: tl.constexpr, BOTH: tl.constexpr):
    row, col = tl.program_id(0) * 128 + tl.arange(0, 128), tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = row[:, None].to(tl.int64) * num_cols + col[None, :]
    inside = (row < num_rows)[:, None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    code, scale = _encode(v, tl.max(tl.abs(v), 0)[None, :])
    tl.store(q_t + col[:, None].to(tl.int64) * num_rows + row[None, :], tl.trans(code), mask=(row < num_rows)[None, :])
    tl.store(scales_t + tl.program_id(0) * num_cols + col[None, :], scale)
    if BOTH:
        code, scale = _encode(v, tl.max(tl.abs(v), 1)[:, None])
        tl.store(q + at, code, mask=inside)
        tl.store(scales + tl.program_id(1) * num_rows + row[:, None], scale, mask=inside)


@triton.jit
def _swiglu(
    x, q, scales, counts, num_rows, num_cols, expert_rows, expert_pitch, pitch, ROWS: tl.constexpr, MASKED: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    expert = tl.program_id(0) * ROWS // expert_rows
    of_expert = row - expert * expert_rows
    inside = (of_expert < tl.load(counts + expert))[:, None] if MASKED else (row < num_rows)[:, None]
    at = row[:, None].to(tl.int64) * (2 * num_cols) + col[None, :]
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + num_cols, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    code, scale = _encode(h, tl.max(tl.abs(h), 1)[:, None])
    tl.store(q + row[:, None].to(tl.int64) * num_cols + col[None, :], code, mask=inside)
    tl.store(scales + expert * expert_pitch + tl.program_id(1) * pitch + of_expert[:, None], scale, mask=inside)


@triton.jit
def _swiglu_backward(x, grad, grad_x, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < num_rows)[:, None]
    at = row[:, None].to(tl.int64) * (2 * num_cols) + col[None, :]
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + num_cols, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(grad + row[:, None].to(tl.int64) * num_cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    tl.store(grad_x + at, (dh * up * (s + silu * (1 - s))).to(tl.bfloat16), mask=inside)
    tl.store(grad_x + at + num_cols, (dh * silu).to(tl.bfloat16), mask=inside)


def scales_like(rows: int, cols: int) -> torch.Tensor:
    """MN-major."""
    return torch.empty(cols // BLOCK, rows, device="cuda").t()


def quantize_rows(x, q, scales, tile=8):
    rows, cols = x.shape
    _rows[triton.cdiv(rows, tile), cols // BLOCK](x, q, scales, rows, cols, tile, num_warps=max(1, tile // 4))


def quantize_blocks(x, q, scales, tile=8):
    rows, cols = x.shape
    _blocks[triton.cdiv(rows, BLOCK), cols // BLOCK](x, q, scales, rows, cols, num_warps=tile)


def quantize_transposed(x, q_t, scales_t, tile=128):
    rows, cols = x.shape
    grid = triton.cdiv(rows, BLOCK), cols // tile
    _columns[grid](x, q_t, scales_t, q_t, scales_t, rows, cols, tile, False, num_warps=tile // 16)


def quantize_both(x, q, scales, q_t, scales_t, tile=8):
    rows, cols = x.shape
    grid = triton.cdiv(rows, BLOCK), cols // BLOCK
    _columns[grid](x, q, scales, q_t, scales_t, rows, cols, BLOCK, True, num_warps=tile)


def swiglu_quantize(x, q, scales, tile=8, counts=None):
    """With `counts`, of stacks, one matrix an expert: as many rows of each."""
    rows, cols = q.numel() // q.shape[-1], q.shape[-1]
    expert = (q.shape[1], scales.stride(0)) if counts is not None else (rows, 0)
    grid = triton.cdiv(rows, tile), cols // BLOCK
    constants = {"ROWS": tile, "MASKED": counts is not None, "num_warps": max(1, tile // 4)}
    _swiglu[grid](x, q, scales, counts, rows, cols, *expert, scales.stride(-1), **constants)


def swiglu_backward(x, grad, grad_x, tile=4):
    rows, cols = grad.shape
    grid = triton.cdiv(rows, tile), cols // 256
    _swiglu_backward[grid](x, grad, grad_x, rows, cols, tile, 256, num_warps=max(1, tile))
