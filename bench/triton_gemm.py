"""The Triton peer: an FP8 GEMM with 1x128 by 128x128 scales, of the kind that serving engines carry as their fallback.

Two versions of one loop, by pointers (cp.async) and by tensor descriptors (TMA); `tune` takes the fastest for a shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_K = 128  # one scale per k-block; constant, as in the format


@triton.jit
def _tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles go down a group of GROUP_M rows before they go right: what is loaded stays in L2 while it is needed."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first_m = pid // per_group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    return first_m + pid % per_group % rows, pid % per_group // rows


@triton.jit
def _load_scales(sfa, sfb, offs_m, tile_n, kb, M, sfa_m, sfa_k, sfb_n, sfb_k, BLOCK_N: tl.constexpr):
    """The product of both scales, [BLOCK_M, 1]: a tile lies in one row of B's scales because BLOCK_N divides 128."""
    scale_b = tl.load(sfb + tile_n * BLOCK_N // 128 * sfb_n + kb * sfb_k)
    scale_a = tl.load(sfa + offs_m * sfa_m + kb * sfa_k, mask=offs_m < M, other=0.0)
    return (scale_a * scale_b)[:, None]


@triton.jit
def gemm_pointers(
    a, b, d, sfa, sfb, M, N, K, a_m, b_n, d_m, sfa_m, sfa_k, sfb_n, sfb_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a + (offs_m % M)[:, None].to(tl.int64) * a_m + offs_k[None, :]
    b_ptrs = b + (offs_n % N)[None, :].to(tl.int64) * b_n + offs_k[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for kb in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            a_tile = tl.load(a_ptrs)
            b_tile = tl.load(b_ptrs)
        else:
            a_tile = tl.load(a_ptrs, mask=offs_k[None, :] < K - kb * BLOCK_K, other=0.0)
            b_tile = tl.load(b_ptrs, mask=offs_k[:, None] < K - kb * BLOCK_K, other=0.0)
        scale = _load_scales(sfa, sfb, offs_m, tile_n, kb, M, sfa_m, sfa_k, sfb_n, sfb_k, BLOCK_N)
        acc += tl.dot(a_tile, b_tile) * scale
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(d + offs_m[:, None].to(tl.int64) * d_m + offs_n[None, :], acc.to(tl.bfloat16), mask=mask)


@triton.jit
def gemm_descriptors(
    a, b, d, sfa, sfb, M, N, K, sfa_m, sfa_k, sfb_n, sfb_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for kb in range(0, tl.cdiv(K, BLOCK_K)):
        a_tile = a.load([tile_m * BLOCK_M, kb * BLOCK_K])
        b_tile = b.load([tile_n * BLOCK_N, kb * BLOCK_K])
        scale = _load_scales(sfa, sfb, offs_m, tile_n, kb, M, sfa_m, sfa_k, sfb_n, sfb_k, BLOCK_N)
        acc += tl.dot(a_tile, b_tile.T) * scale
    d.store([tile_m * BLOCK_M, tile_n * BLOCK_N], acc.to(tl.bfloat16))


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool
    group_m: int = 8

    def __str__(self) -> str:
        how = "tma" if self.descriptors else "ptr"
        return f"{self.block_m}x{self.block_n} {how} warps={self.num_warps} stages={self.num_stages}"


def configs(m: int) -> list[Config]:
    """The candidates for M rows: few, since each costs a compile of seconds, but the ones that win in practice."""
    if m <= 64:
        tiles = [(64, 32, 4, 6), (64, 64, 4, 5), (64, 128, 4, 4)]
    else:
        tiles = [(128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4)]
    return [Config(*tile, descriptors=descriptors) for tile in tiles for descriptors in (True, False)]


def launcher(config: Config, a, sfa, b, sfb, out) -> Callable[[], None]:
    """A call that computes `out = a * b.T` with this config; a [M, K], b [N, K] E4M3, scales FP32 with any strides."""
    (m, k), n = a.shape, b.shape[0]
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    scale_strides = (*sfa.stride(), *sfb.stride())
    tile = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=BLOCK_K, GROUP_M=config.group_m)
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)

    if config.descriptors:
        a_desc = TensorDescriptor.from_tensor(a, [config.block_m, BLOCK_K])
        b_desc = TensorDescriptor.from_tensor(b, [config.block_n, BLOCK_K])
        d_desc = TensorDescriptor.from_tensor(out, [config.block_m, config.block_n])

        def call() -> None:
            gemm_descriptors[grid](a_desc, b_desc, d_desc, sfa, sfb, m, n, k, *scale_strides, **tile, **options)
    else:
        strides = (a.stride(0), b.stride(0), out.stride(0), *scale_strides)
        even_k = k % BLOCK_K == 0

        def call() -> None:
            gemm_pointers[grid](a, b, out, sfa, sfb, m, n, k, *strides, **tile, EVEN_K=even_k, **options)

    return call


def tune(
    a, sfa, b, sfb, out, is_right: Callable[[torch.Tensor], bool], log: Callable[[str], None]
) -> tuple[Config, Callable]:
    """The fastest candidate of those that give the right product. Few runs, warm L2: enough to choose by."""
    best = None
    for config in configs(a.shape[0]):
        try:
            call = launcher(config, a, sfa, b, sfb, out)
            out.fill_(float("nan"))
            call()
            torch.cuda.synchronize()
            if not is_right(out):
                log(f"triton {config}: wrong result, left out")
                continue
            time = _quick_time(call)
        except Exception as error:  # a config may not fit, or a feature be missing: the others still can
            log(f"triton {config}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
            continue
        if best is None or time < best[0]:
            best = (time, config, call)
    if best is None:
        raise RuntimeError("no Triton config ran")
    return best[1], best[2]


def _quick_time(call: Callable[[], None], repeats: int = 5) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(2_000_000)
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return min(first.elapsed_time(second) for first, second in itertools.pairwise(events))
