"""`torch.ops.phalanx`: the operations as PyTorch operators, with fake kernels for torch.compile and torch.export.

`phalanx.gemm_fp8` and the others call these by themselves where torch.compile or torch.export trace them, and where
tensors are no plain ones or on the meta device. Tracers that run plain tensors (torch.jit.trace, make_fx with real
ones, a TorchDispatchMode) do not see `phalanx.gemm_fp8`: there, call these. Importing `phalanx` after `torch` imports
this module, as does a first eager call on a tensor; else import it yourself before the first compiled call.

    gemm_fp8(a, sfa, b, sfb, c=None, out_dtype=None, num_sms=0, batch_invariant=False, constant_b=False) -> D
    quantize(x, blocks, pow2_scales) -> (data, scales)        blocks: 128 x 128 rather than 1 x 128
    dequantize(data, scales, dtype=None) -> x

and `*_out`, which write into tensors of the caller. None has a gradient. Others add the
grouped ones (`phalanx._torch_grouped`), those of BF16 (`_torch_bf16`), those that move tokens (`_torch_moe`) and SwiGLU
(`_torch_activation`).
"""

import torch

from phalanx import _frameworks, _native
from phalanx._frameworks.base import matrix_shape
from phalanx._frameworks.torch import count_change, framework

for _tensor_type in (torch.Tensor, torch.nn.Parameter):
    _frameworks.by_type[_tensor_type] = framework

_library = torch.library.Library("phalanx", "DEF")
# torch 2.6 has the weaker promise alone: the order of the strides that an operator was traced with.
_keeps_strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)


def define_operator(schema: str, fake):
    """Defines an operator: the decorated function runs it on any device, `fake` only allocates its result."""

    written = [i for i, argument in enumerate(schema.split(",")) if "!" in argument]

    def define(function):
        def run(*args):
            function(*args)
            for i in written:
                count_change(args[i])

        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, _keeps_strides))
        _library.impl(name, run if written else function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"phalanx::{name}", fake, lib=_library)
        return function

    return define


# A gradient may be any view of what torch made.


def has_aligned_rows(x: torch.Tensor) -> bool:
    """Whether kernels can read its rows: contiguous, and 16-byte aligned as far as the view decides."""
    granule = 16 // x.element_size()
    if x.storage_offset() % granule != 0:
        return False
    if x.is_contiguous():
        return x.shape[-1] % granule == 0
    return x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % granule == 0 and x.stride(0) >= x.shape[1]


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy where that is needed; torch.compile cannot tell."""
    if not torch.compiler.is_dynamo_compiling() and has_aligned_rows(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _empty_product(a, sfa, b, sfb, c=None, out_dtype=None, num_sms=0, batch_invariant=False, constant_b=False):
    return framework.empty_product(a, b, c, out_dtype)


def _empty_quantized(x, blocks, pow2_scales):
    return framework.empty_quantized(*matrix_shape("x", x), blocks, x)


def _empty_dequantized(data, scales, dtype=None):
    return framework.empty_rows(*matrix_shape("data", data), dtype or torch.float32, data)


def add_gradient(name: str, backward, setup_context) -> None:
    """Makes an operator differentiable."""
    torch.library.register_autograd(f"phalanx::{name}", backward, setup_context=setup_context, lib=_library)


def refuse_gradient(name: str) -> None:
    """Makes it an error to differentiate an operator, where torch would warn and go on with zeros."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"phalanx::{name} has no gradient: what uses it can be differentiated once")

    add_gradient(name, refuse, None)


def nothing(*args, **kwargs):
    pass


@define_operator(
    "gemm_fp8_out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor(out!) out, Tensor? c=None, int num_sms=0,"
    " bool batch_invariant=False, bool constant_b=False) -> ()",
    nothing,
)
def _gemm_fp8_out(a, sfa, b, sfb, out, c=None, num_sms=0, batch_invariant=False, constant_b=False):
    _native.gemm_fp8(a, sfa, b, sfb, out, c, num_sms, batch_invariant, constant_b, None)


@define_operator(
    "gemm_fp8(Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor? c=None, ScalarType? out_dtype=None, int num_sms=0,"
    " bool batch_invariant=False, bool constant_b=False) -> Tensor",
    _empty_product,
)
def _gemm_fp8(a, sfa, b, sfb, c=None, out_dtype=None, num_sms=0, batch_invariant=False, constant_b=False):
    out = framework.empty_product(a, b, c, out_dtype)
    _gemm_fp8_out(a, sfa, b, sfb, out, c, num_sms, batch_invariant, constant_b)
    return out


@define_operator(
    "quantize_out(Tensor x, Tensor(data!) data, Tensor(scales!) scales, bool blocks, bool pow2_scales) -> ()", nothing
)
def _quantize_out(x, data, scales, blocks, pow2_scales):
    _native.quantize(x, data, scales, blocks, pow2_scales, None)


@define_operator("quantize(Tensor x, bool blocks, bool pow2_scales) -> (Tensor, Tensor)", _empty_quantized)
def _quantize(x, blocks, pow2_scales):
    data, scales = _empty_quantized(x, blocks, pow2_scales)
    _quantize_out(x, data, scales, blocks, pow2_scales)
    return data, scales


@define_operator("dequantize_out(Tensor data, Tensor scales, Tensor(out!) out) -> ()", nothing)
def _dequantize_out(data, scales, out):
    _native.dequantize(data, scales, out, None)


@define_operator("dequantize(Tensor data, Tensor scales, ScalarType? dtype=None) -> Tensor", _empty_dequantized)
def _dequantize(data, scales, dtype=None):
    out = _empty_dequantized(data, scales, dtype)
    _dequantize_out(data, scales, out)
    return out


from phalanx import _torch_activation, _torch_bf16, _torch_grouped, _torch_moe  # noqa: E402, F401
