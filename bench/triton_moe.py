"""Permuting and un-permuting in Triton, as one writes them there: a program for each row, or token, and piece of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _permute(
    x, scales, sources, rows, row_scales, hidden, columns, scale_pitch, row_pitch, expert_rows, expert_pitch, topk,
    BLOCK: tl.constexpr, HAS_SCALES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0), tl.program_id(1)
    source = tl.load(sources + row)
    token = tl.maximum(source, 0) // topk
    at = piece * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token.to(tl.int64) * hidden + at, mask=(at < hidden) & (source >= 0), other=0)
    written = at < hidden
    if MASKED:
        written = written & (source >= 0)
    tl.store(rows + row.to(tl.int64) * hidden + at, value, mask=written)
    if HAS_SCALES:  # by the first program of a row
        column = tl.arange(0, 128)
        there = (column < columns) & (piece == 0)
        if MASKED:
            there = there & (source >= 0)
        scale = tl.load(scales + column * scale_pitch + token, mask=there & (source >= 0), other=1.0)
        expert = row // expert_rows
        to = row_scales + expert * expert_pitch + column * row_pitch + (row - expert * expert_rows)
        tl.store(to, scale, mask=there)


@triton.jit
def _unpermute(rows, slots, weights, out, hidden, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    token, piece = tl.program_id(0), tl.program_id(1)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOPK):
        slot = tl.load(slots + token * TOPK + k)
        weight = tl.load(weights + token * TOPK + k)
        value = tl.load(rows + slot.to(tl.int64) * hidden + at, mask=(at < hidden) & (slot >= 0), other=0)
        total += weight * value.to(tl.float32)
    tl.store(out + token.to(tl.int64) * hidden + at, total.to(tl.bfloat16), mask=at < hidden)


def permute(x: torch.Tensor, scales: torch.Tensor | None, sources, rows, row_scales, topk: int) -> None:
    """`scales` and `row_scales` MN-major, or None. Rows in a stack, one matrix an expert: those of no token stay."""
    elements, out = (x, rows) if x.dtype == torch.bfloat16 else (x.view(torch.uint8), rows.view(torch.uint8))
    hidden, block = x.shape[1], 2048 if x.dtype == torch.bfloat16 else 4096
    columns, *pitches = (0, 0, 0) if scales is None else (scales.shape[1], scales.stride(1), row_scales.stride(-1))
    masked = rows.ndim == 3
    expert = (rows.shape[1], row_scales.stride(0)) if masked else (len(sources), 0)
    grid = len(sources), triton.cdiv(hidden, block)
    constants = {"BLOCK": block, "HAS_SCALES": scales is not None, "MASKED": masked}
    _permute[grid](elements, scales, sources, out, row_scales, hidden, columns, *pitches, *expert, topk, **constants)


def unpermute(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    block = 1024
    grid = out.shape[0], triton.cdiv(out.shape[1], block)
    _unpermute[grid](rows, slots, weights, out, out.shape[1], TOPK=slots.shape[1], BLOCK=block, num_warps=4)
