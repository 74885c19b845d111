"""Phalanx and its peers behind one interface. Whatever is missing says why, and the others run."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.cases import Problem, dequantize, mn_major

ROOT = Path(__file__).resolve().parent.parent
MAX_ERROR = 1e-2  # of a norm: BF16 output alone gives 1.7e-3, BF16 operands 3e-3; a wrong scale gives 1e-1 and more

Call = Callable[[], object]
Log = Callable[[str], None]


class Library:
    """Constructing one raises if the library cannot be used here; `prepare` raises if it cannot do the problem."""

    name = ""
    label = ""  # in tables and plots
    operand_bytes = 1  # of an element of A and B
    constant_weights = False  # of a chain: no kernel of it writes them

    def prepare(self, problem: Problem, log: Log) -> Call:
        """A call that writes the product to `problem.out`. Whatever can be done once is done here."""
        raise NotImplementedError

    def note(self) -> str:
        """What was chosen for the last problem, if the library tells."""
        return ""


class Phalanx(Library):
    name, label = "phalanx", "Phalanx"

    def __init__(self) -> None:
        import phalanx

        self.module = phalanx

    def prepare(self, problem: Problem, log: Log) -> Call:
        gemm, out = self.module.gemm_fp8, problem.out
        a, b = (problem.a, problem.sfa), (problem.b, problem.sfb)
        return lambda: gemm(a, b, out=out, constant_b=self.constant_weights)


class PhalanxBatchInvariant(Phalanx):
    """Not a peer: what the mode costs. Only where it is named."""

    name, label = "phalanx_batch_invariant", "Phalanx, batch-invariant"

    def prepare(self, problem: Problem, log: Log) -> Call:
        gemm, out = self.module.gemm_fp8, problem.out
        a, b = (problem.a, problem.sfa), (problem.b, problem.sfb)
        return lambda: gemm(a, b, out=out, batch_invariant=True)


class DeepGemm(Library):
    name, label = "deep_gemm", "DeepGEMM"

    def __init__(self) -> None:
        site = Path(os.environ.get("PHALANX_PEERS", ROOT / ".peers" / "site"))
        if site.is_dir() and str(site) not in sys.path:
            sys.path.append(str(site))
        os.environ.setdefault("DG_JIT_CACHE_DIR", str(Path(tempfile.gettempdir()) / "deep_gemm_cache"))
        import deep_gemm

        self.module = deep_gemm

    def prepare(self, problem: Problem, log: Log) -> Call:
        gemm, out = self.module.fp8_gemm_nt, problem.out
        a, b = (problem.a, problem.sfa), (problem.b, problem.sfb)  # already in the layout that its kernel reads
        return lambda: gemm(a, b, out, recipe=(1, 128, 128))


class TorchScaledMm(Library):
    """cuBLASLt's block-scaled product, through either of torch's two doors."""

    name, label = "torch_scaled_mm", "cuBLASLt FP8 (torch._scaled_mm)"

    def __init__(self) -> None:
        self._via = ""

    def prepare(self, problem: Problem, log: Log) -> Call:
        for via, make in (("_scaled_mm", self._first), ("_scaled_mm_v2", self._second)):
            try:
                call = make(problem)
                error = problem.check(call, problem.out)
            except Exception as reason:
                log(f"{problem.shape} torch.{via}: {type(reason).__name__}: {str(reason).splitlines()[0][:200]}")
                continue
            if error < MAX_ERROR:
                self._via = via
                return call
            log(f"{problem.shape} torch.{via}: relative error {error:.1e}")
        raise RuntimeError("neither torch._scaled_mm nor torch._scaled_mm_v2 does this product")

    @staticmethod
    def _first(problem: Problem) -> Call:
        p = problem
        bt, sfa, sfb = p.b.t(), mn_major(p.sfa, 1), p.sfb.t()
        return lambda: torch._scaled_mm(p.a, bt, sfa, sfb, out_dtype=torch.bfloat16, use_fast_accum=False, out=p.out)

    @staticmethod
    def _second(problem: Problem) -> Call:
        from torch.nn.functional import ScalingType, SwizzleType

        p = problem
        rows, k_blocks = p.sfb.shape
        padded = torch.zeros(rows, -(-k_blocks // 4) * 4, dtype=p.sfb.dtype, device=p.sfb.device)
        padded[:, :k_blocks] = p.sfb
        bt, sfa, sfb = p.b.t(), [mn_major(p.sfa, 1)], [padded.t()]
        by_row, by_block = [ScalingType.BlockWise1x128.value], [ScalingType.BlockWise128x128.value]
        plain = [SwizzleType.NO_SWIZZLE.value]
        return lambda: torch._scaled_mm_v2(
            p.a, bt, sfa, by_row, plain, sfb, by_block, plain, None, torch.bfloat16, [], False, out=p.out
        )

    def note(self) -> str:
        return self._via


class Cutlass(Library):
    """CUTLASS's block-scaled product, as vLLM ships and chooses it."""

    name, label = "cutlass", "CUTLASS (vLLM)"
    _EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._C")  # of vLLM's versions, newest first

    def __init__(self) -> None:
        for extension in self._EXTENSIONS:
            with contextlib.suppress(ImportError):
                importlib.import_module(extension)
            if hasattr(torch.ops._C, "cutlass_scaled_mm"):
                return
        raise ImportError("vLLM, whose operators include CUTLASS's product, is not here")

    def prepare(self, problem: Problem, log: Log) -> Call:
        p = problem
        bt, sfa, sfb = p.b.t(), mn_major(p.sfa, 1), p.sfb.t()
        return lambda: torch.ops._C.cutlass_scaled_mm(p.out, p.a, bt, sfa, sfb, None)


class CublasBf16(Library):
    """The unquantised product: twice the bytes of A and B, half the rate of the tensor cores."""

    name, label, operand_bytes = "cublaslt_bf16", "cuBLASLt BF16 (torch.mm)", 2

    def prepare(self, problem: Problem, log: Log) -> Call:
        out = problem.out
        x = dequantize(problem.a, problem.sfa, 1).bfloat16()
        wt = dequantize(problem.b, problem.sfb, 128).bfloat16().t()
        return lambda: torch.mm(x, wt, out=out)


class Triton(Library):
    name, label = "triton", "Triton"

    def __init__(self) -> None:
        from bench import triton_gemm

        self.module = triton_gemm
        self._config = ""

    def prepare(self, problem: Problem, log: Log) -> Call:
        p = problem
        config, call = self.module.tune(p.a, p.sfa, p.b, p.sfb, p.out, lambda out: p.error_of(out) < MAX_ERROR, log)
        self._config = str(config)
        return call

    def note(self) -> str:
        return self._config


ALL: tuple[type[Library], ...] = (Phalanx, DeepGemm, TorchScaledMm, Cutlass, Triton, CublasBf16)
MODES: tuple[type[Library], ...] = (PhalanxBatchInvariant,)
LABELS = {library.name: library.label for library in (*ALL, *MODES)}
OURS = Phalanx.name
FP8_PEERS = tuple(library.name for library in ALL if library.operand_bytes == 1 and library.name != OURS)


def load(only: tuple[str, ...] = ()) -> tuple[list[Library], dict[str, str]]:
    """The libraries that are here, and of the others why not."""
    libraries, missing = [], {}
    wanted = [library for library in (*ALL, *MODES) if library.name in only] if only else ALL
    for library in wanted:
        try:
            libraries.append(library())
        except Exception as error:
            missing[library.name] = f"{type(error).__name__}: {error}"
    return libraries, missing
