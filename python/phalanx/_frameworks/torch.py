"""PyTorch. tvm-ffi takes tensors, and the current stream, straight from torch's C API; so this path is lean."""

import torch

from phalanx import _native
from phalanx._frameworks.base import Framework, foreign, no_array

_BF16 = torch.bfloat16
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_increment_version = torch.autograd.graph.increment_version
_is_traced = torch.compiler.is_dynamo_compiling
_forward_ad = torch.autograd.forward_ad


def _is_special(array):
    """A tensor without memory that one could point at: not a plain one, or of the meta device."""
    return isinstance(array, torch.Tensor) and (type(array) not in _PLAIN or array.is_meta)


def _has_tangent(array):
    return isinstance(array, torch.Tensor) and _forward_ad.unpack_dual(array).tangent is not None


def count_change(tensor):
    """For autograd, and whoever keeps what follows from a tensor: torch does not see what others write."""
    try:  # noqa: SIM105  contextlib.suppress takes as long as all the rest
        _increment_version(tensor)
    except RuntimeError:  # made in inference mode it counts none
        pass


class Torch(Framework):
    e4m3 = torch.float8_e4m3fn
    bf16 = _BF16
    f32 = torch.float32
    i32 = torch.int32

    def empty(self, shape, strides, dtype, like):
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)

    def view(self, array):
        return array

    def writable_view(self, array):
        if not isinstance(array, torch.Tensor):
            return foreign(array, "PyTorch")
        count_change(array)
        return array

    def check_out(self, out, dtype, name="out_dtype"):
        if dtype is not None:
            super().check_out(out, dtype, name)
        if getattr(out, "requires_grad", False) and torch.is_grad_enabled():
            raise ValueError(
                "out: it requires a gradient, which a product written into it has not; expected torch.no_grad()"
            )

    def itemsize(self, dtype):
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: {dtype!r}; expected a torch.dtype")
        return dtype.itemsize

    def device_of(self, like):
        return like.device.type == "cuda", like.device.index or 0

    # Traced calls, and tensors that are none (fake, functional, meta, users' subclasses), go through torch's
    # dispatcher, to the operators of phalanx.torch. The others call the module directly.

    def is_traced(self, *arrays):
        return _is_traced() or any(map(_is_special, arrays))

    def needs_gradient(self, *arrays):
        if _forward_ad._current_level >= 0 and any(map(_has_tangent, arrays)):
            raise NotImplementedError("forward-mode derivatives: Phalanx has those of the backward mode alone")
        return torch.is_grad_enabled() and any(getattr(array, "requires_grad", False) for array in arrays)

    def traced(self, name, operands, out, new, options):
        if out is None:
            return getattr(torch.ops.phalanx, name)(*operands, *new, *options)
        getattr(torch.ops.phalanx, name + "_out")(*operands, out, *options)
        return out

    def gemm_fp8(self, a, sfa, b, sfb, c, out, out_dtype, num_sms, batch_invariant, constant_b):
        if _is_traced() or type(a) not in _PLAIN:
            return self._traced_gemm(a, sfa, b, sfb, c, out, out_dtype, num_sms, batch_invariant, constant_b)
        given = out
        if out is None:
            out = self.empty_product(a, b, c, out_dtype)
        else:
            self.check_out(out, out_dtype)
            out = self.writable_view(out)
        try:
            _native.gemm_fp8(a, sfa, b, sfb, out, c, num_sms, batch_invariant, constant_b, None)
        # Asked only now: each question takes a part of a call's few microseconds. torch 2.7 hands on tensors without
        # memory, hence the second kind.
        except (RuntimeError, ValueError):
            if not (_is_special(a) or _is_special(b)):
                raise
            return self._traced_gemm(a, sfa, b, sfb, c, given, out_dtype, num_sms, batch_invariant, constant_b)
        return out

    def _traced_gemm(self, a, sfa, b, sfb, c, out, out_dtype, *options):
        if out is None:
            return torch.ops.phalanx.gemm_fp8(a, sfa, b, sfb, c, out_dtype, *options)
        self.check_out(out, out_dtype)
        torch.ops.phalanx.gemm_fp8_out(a, sfa, b, sfb, out, c, *options)
        return out

    def empty_product(self, a, b, c, out_dtype):
        try:
            (m, _), (n, _) = a.shape, b.shape
            dtype = out_dtype or (_BF16 if c is None else c.dtype)
        except ValueError:
            raise ValueError(f"a.data, b.data: shapes {[*a.shape]}, {[*b.shape]}; expected two matrices") from None
        except AttributeError:
            raise (no_array("c", c) if hasattr(b, "shape") else no_array("b.data", b)) from None
        if type(dtype) is not torch.dtype:
            if out_dtype:
                raise TypeError(f"out_dtype: {out_dtype!r}; expected a torch.dtype")
            raise TypeError(f"c: {type(c).__name__}; expected a torch.Tensor")
        stride = -(-n // 8) * 8  # 16 bytes of BF16, 32 of FP32
        # empty_strided is much quicker than empty, whose arguments take longer to parse.
        return torch.empty_strided((m, n), (stride, 1), dtype=dtype, device=a.device)

    def quantize(self, x, blocks, pow2_scales, out):
        if _is_traced() or _is_special(x):
            if out is None:
                return torch.ops.phalanx.quantize(x, blocks, pow2_scales)
            torch.ops.phalanx.quantize_out(x, *out, blocks, pow2_scales)
            return out
        return super().quantize(x, blocks, pow2_scales, out)

    def dequantize(self, data, scales, out, dtype):
        if _is_traced() or _is_special(data):
            if out is None:
                return torch.ops.phalanx.dequantize(data, scales, dtype)
            self.check_out(out, dtype, "dtype")
            torch.ops.phalanx.dequantize_out(data, scales, out)
            return out
        return super().dequantize(data, scales, out, dtype)


framework = Torch()
