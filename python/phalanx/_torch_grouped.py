"""The grouped products and weight gradients as PyTorch operators; `phalanx.torch` imports this module.

    grouped_gemm_fp8(a, sfa, b, sfb, offsets, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False) -> D
    grouped_gemm_fp8_indexed(..., row_groups, ...), grouped_gemm_fp8_masked(..., counts, ...) -> D
    grouped_gemm_fp8_swiglu(a, sfa, b, sfb, offsets, weights, limit, pow2_scales, num_sms=0, expected_rows=0,
        batch_invariant=False) -> (data, scales)
    wgrad_fp8(a, sfa, b, sfb, num_sms=0) -> D
    grouped_wgrad_fp8(a, sfa, b, sfb, offsets, num_sms=0) -> D

and `*_out`, which write into a tensor of the caller, those of the gradients with `accumulate`.
"""

from phalanx import _native
from phalanx._frameworks.torch import framework
from phalanx._grouped import empty_gradient, empty_grouped, empty_swiglu
from phalanx.torch import define_operator, nothing

_OPERANDS = "Tensor a, Tensor sfa, Tensor b, Tensor sfb"


def _define_grouped(name: str, groups: str) -> None:
    native = name  # looked up at the first call: the module loads then
    operands = f"{_OPERANDS}, Tensor {groups}"
    options = "int num_sms=0, SymInt expected_rows=0, bool batch_invariant=False"

    def empty(a, sfa, b, sfb, groups, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
        return empty_grouped(framework, a, b, out_dtype)

    @define_operator(f"{name}_out({operands}, Tensor(out!) out, {options}) -> ()", nothing)
    def run_out(a, sfa, b, sfb, groups, out, num_sms=0, expected_rows=0, batch_invariant=False):
        getattr(_native, native)(a, sfa, b, sfb, groups, out, num_sms, expected_rows, batch_invariant, None)

    @define_operator(f"{name}({operands}, ScalarType? out_dtype=None, {options}) -> Tensor", empty)
    def run(a, sfa, b, sfb, groups, out_dtype=None, num_sms=0, expected_rows=0, batch_invariant=False):
        out = empty_grouped(framework, a, b, out_dtype)
        run_out(a, sfa, b, sfb, groups, out, num_sms, expected_rows, batch_invariant)
        return out


_define_grouped("grouped_gemm_fp8", "offsets")
_define_grouped("grouped_gemm_fp8_indexed", "row_groups")
_define_grouped("grouped_gemm_fp8_masked", "counts")


def _empty_swiglu(
    a, sfa, b, sfb, offsets, weights, limit, pow2_scales, num_sms=0, expected_rows=0, batch_invariant=False
):
    return empty_swiglu(framework, a, b)


@define_operator(
    f"grouped_gemm_fp8_swiglu({_OPERANDS}, Tensor offsets, Tensor? weights, float limit, bool pow2_scales,"
    " int num_sms=0, SymInt expected_rows=0, bool batch_invariant=False) -> (Tensor, Tensor)",
    _empty_swiglu,
)
def _swiglu(a, sfa, b, sfb, offsets, weights, limit, pow2_scales, num_sms=0, expected_rows=0, batch_invariant=False):
    out = empty_swiglu(framework, a, b)
    _native.grouped_gemm_fp8_swiglu(
        a, sfa, b, sfb, offsets, weights, None, *out, limit, pow2_scales, num_sms, expected_rows, batch_invariant, None
    )
    return out


@define_operator(
    f"wgrad_fp8_out({_OPERANDS}, Tensor(out!) out, bool accumulate=False, int num_sms=0) -> ()",
    nothing,
)
def _wgrad_out(a, sfa, b, sfb, out, accumulate=False, num_sms=0):
    _native.wgrad_fp8(a, sfa, b, sfb, None, out, accumulate, num_sms, None)


@define_operator(
    f"grouped_wgrad_fp8_out({_OPERANDS}, Tensor offsets, Tensor(out!) out, bool accumulate=False, int num_sms=0) -> ()",
    nothing,
)
def _grouped_wgrad_out(a, sfa, b, sfb, offsets, out, accumulate=False, num_sms=0):
    _native.wgrad_fp8(a, sfa, b, sfb, offsets, out, accumulate, num_sms, None)


@define_operator(
    f"wgrad_fp8({_OPERANDS}, int num_sms=0) -> Tensor",
    lambda a, sfa, b, sfb, num_sms=0: empty_gradient(framework, a, b, None),
)
def _wgrad(a, sfa, b, sfb, num_sms=0):
    out = empty_gradient(framework, a, b, None)
    _wgrad_out(a, sfa, b, sfb, out, False, num_sms)
    return out


@define_operator(
    f"grouped_wgrad_fp8({_OPERANDS}, Tensor offsets, int num_sms=0) -> Tensor",
    lambda a, sfa, b, sfb, offsets, num_sms=0: empty_gradient(framework, a, b, offsets),
)
def _grouped_wgrad(a, sfa, b, sfb, offsets, num_sms=0):
    out = empty_gradient(framework, a, b, offsets)
    _grouped_wgrad_out(a, sfa, b, sfb, offsets, out, False, num_sms)
    return out
