"""PyTorch modules. `import phalanx.nn` after torch."""

import functools

import torch

import phalanx
from phalanx import _frameworks, _native
from phalanx._frameworks.base import dtype_of, matrix_shape
from phalanx.torch import aligned_rows


class ExpertMLP(torch.nn.Module):
    """The experts of a mixture-of-experts layer on one device.

    y[t] = sum over k of topk_weights[t, k] * MLP_e(x[t]) with e = topk_idx[t, k], where
    MLP_e(x) = (silu(x · gate_eᵀ) * (x · up_eᵀ)) · down_eᵀ

    Products are FP8 with fine-grained scales, forward and backward: activations and gradients with one scale per
    1 x 128, weights with one per 128 x 128. Everything else is BF16 with FP32 inside, sums over experts FP32 in a fixed
    order. Nothing waits for the device.

        mlp = ExpertMLP(num_experts=32, hidden=7168, intermediate=2048, device="cuda")
        y = mlp(x, topk_idx, topk_weights)

    At most 512 experts; hidden and intermediate are multiples of 128. The weights are parameters: `gate_up`
    [E, 2 * intermediate, hidden], gate first, and `down` [E, hidden, intermediate]. They are quantised once, and again
    after they have changed; under torch.compile in every call that records gradients, else as they were at the last
    eager call. What torch does not count as a change is not seen: through `.data`, or in place where they were made in
    inference mode. Differentiable once.
    """

    def __init__(self, num_experts: int, hidden: int, intermediate: int, device=None, dtype=torch.bfloat16):
        super().__init__()
        if not 1 <= num_experts <= 512:
            raise ValueError(f"num_experts: {num_experts}; expected 1 to 512")
        for name, size in (("hidden", hidden), ("intermediate", intermediate)):
            if size < 128 or size % 128:
                raise ValueError(f"{name}: {size}; expected a multiple of 128")
        self.num_experts = num_experts

        def weight(rows: int, cols: int) -> torch.nn.Parameter:
            values = torch.randn(num_experts, rows, cols, device=device) * cols**-0.5
            return torch.nn.Parameter(values.to(dtype))

        self.gate_up = weight(2 * intermediate, hidden)
        self.down = weight(hidden, intermediate)
        self._quantized: tuple[torch.Tensor, ...] | None = None
        self._quantized_of: tuple | None = None  # gate_up, down and their versions

    def forward(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """y [T, hidden]. x BF16 [T, hidden]; topk_idx int32 or int64 [T, K], -1: none; topk_weights FP32 [T, K]."""
        gate_up, down = self.gate_up, self.down  # each look-up of a parameter takes torch a microsecond
        if torch.compiler.is_compiling() and (torch.is_grad_enabled() or self._quantized is None):
            weights = _quantize(gate_up, down)  # in the graph: a compiled step changes them, and cannot tell whether
        elif torch.compiler.is_compiling():
            weights = self._quantized
        else:
            weights = self._quantized_from(gate_up, down)
        framework = _frameworks.of(x, "x")
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"x: {x.dtype}; expected torch.bfloat16")
        matrix_shape("topk_idx", topk_idx)
        if dtype_of("topk_weights", topk_weights) != torch.float32:
            raise TypeError(f"topk_weights: {topk_weights.dtype}; expected torch.float32")
        if framework.needs_gradient(x, topk_weights, gate_up, down):
            _check_shapes(x, topk_idx, topk_weights, gate_up.shape[2])
            return _ExpertMLP.apply(x, topk_idx, topk_weights, gate_up, down, weights)
        if framework.is_traced(x):
            return _forward(x, topk_idx, topk_weights, weights)[0]
        return _in_one_call(x, topk_idx, topk_weights, weights)

    def quantized_weights(self) -> tuple[torch.Tensor, ...]:
        """Data and scales of gate_up and down, then of both with rows and columns swapped, for the backward pass."""
        return self._quantized_from(self.gate_up, self.down)

    def __getstate__(self):
        return super().__getstate__() | {"_quantized": None, "_quantized_of": None}  # made again where they are wanted

    def _quantized_from(self, gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            versions = gate_up.data_ptr(), gate_up._version, down.data_ptr(), down._version
        except RuntimeError:  # made in inference mode: they count no changes
            versions = gate_up.data_ptr(), down.data_ptr()
        of = self._quantized_of  # it keeps both, or another tensor could have their address and version
        if of is None or of[0] is not gate_up or of[1] is not down or of[2] != versions:
            quantized = _quantize(gate_up, down)
            if type(quantized[0]) is not torch.Tensor and type(gate_up) is torch.nn.Parameter:
                return quantized  # made under a mode (FakeTensorMode) whose tensors are of no use without it
            self._quantized, self._quantized_of = quantized, (gate_up, down, versions)
        return self._quantized


def _check_shapes(x, topk_idx, topk_weights, hidden: int) -> None:
    """As `_in_one_call` does it below."""
    if x.shape != (topk_idx.shape[0], hidden):
        raise ValueError(f"x: shape {[*x.shape]}; expected {[topk_idx.shape[0], hidden]}, with the T of topk_idx")
    if topk_weights.shape != topk_idx.shape:
        raise ValueError(f"topk_weights: shape {[*topk_weights.shape]}; expected {[*topk_idx.shape]}, that of topk_idx")


def _forward(x, topk_idx, topk_weights, quantized):
    """y, and what was made on the way: rows of gates and ups, the next product's operand, the routing."""
    gate_up, down = quantized[0:2], quantized[2:4]
    rows, routing = phalanx.route_and_permute(phalanx.quantize(x), topk_idx, gate_up[0].shape[0])
    gate_up_rows = phalanx.grouped_gemm_fp8(rows, gate_up, routing.offsets)
    act = phalanx.swiglu_quantize(gate_up_rows)
    y = phalanx.unpermute(phalanx.grouped_gemm_fp8(act, down, routing.offsets), routing, topk_weights)
    return y, gate_up_rows, act, routing


def _in_one_call(x, topk_idx, topk_weights, quantized):
    """y of `_forward`, in a fraction of the host's time."""
    (experts, hidden, intermediate), (tokens, topk) = quantized[2].shape, topk_idx.shape
    # Of torch's ways to make a tensor the quickest.
    y = x.new_empty_strided((x.shape[0], hidden), (hidden, 1), dtype=torch.bfloat16)
    num_words = _workspace_words(tokens, topk, experts, hidden, intermediate)
    workspace = x.new_empty_strided((num_words,), (1,), dtype=torch.int32)
    _native.expert_mlp(x, topk_idx, topk_weights, *quantized[:4], y, workspace, None)
    return y


@functools.lru_cache
def _workspace_words(*sizes: int) -> int:
    return _native.expert_mlp_bytes(*sizes) // 4


class _ExpertMLP(torch.autograd.Function):
    """Rows of no token are not written by the products, and may hold anything. In the backward pass their weight is
    zero, so that they raise no scale of a block that they share with others; neither products nor sums read them.
    """

    @staticmethod
    def forward(ctx, x, topk_idx, topk_weights, gate_up, down, quantized):
        y, gate_up_rows, act, routing = _forward(x, topk_idx, topk_weights, quantized)
        fields = tuple(routing)[:5]  # dynamo of torch 2.7 cannot slice a named tuple
        ctx.save_for_backward(x, topk_weights, gate_up_rows, *act, *fields)
        ctx.quantized = quantized
        ctx.weight_dtypes = gate_up.dtype, down.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, topk_weights, gate_up_rows, act, act_scales, *fields = ctx.saved_tensors
        gate_up_t, down_t = ctx.quantized[4:6], ctx.quantized[6:8]
        routing = phalanx.Routing(*fields)
        offsets = routing.offsets
        row_weights = _take(topk_weights, routing.sources)

        grad_out, grad_out_t = phalanx.quantize_both(phalanx.permute(aligned_rows(grad), routing))
        grad_act = phalanx.grouped_gemm_fp8(grad_out, down_t, offsets)
        grad_gate_up, grad_row_weights = phalanx.swiglu_backward(grad_act, gate_up_rows, row_weights)
        grad_gate_up, grad_gate_up_t = phalanx.quantize_both(grad_gate_up)
        grad_x = phalanx.unpermute(phalanx.grouped_gemm_fp8(grad_gate_up, gate_up_t, offsets), routing)

        grads = [None, None]
        if ctx.needs_input_grad[3]:
            rows_t = phalanx.quantize_transposed(phalanx.permute(aligned_rows(x), routing))
            grads[0] = phalanx.grouped_wgrad_fp8(grad_gate_up_t, rows_t, offsets).to(ctx.weight_dtypes[0])
        if ctx.needs_input_grad[4]:
            weighted = act, act_scales * row_weights[:, None]
            act_t = phalanx.quantize_transposed(phalanx.dequantize(weighted, dtype=x.dtype))
            grads[1] = phalanx.grouped_wgrad_fp8(grad_out_t, act_t, offsets).to(ctx.weight_dtypes[1])
        return grad_x, None, _take(grad_row_weights, routing.slots), *grads, None


def _take(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The flattened values at these indices, 0 where an index is -1."""
    if values.numel() == 0:
        return values.new_zeros(indices.shape)
    return torch.where(indices >= 0, values.flatten()[indices.clamp(min=0)], 0)


def _quantize(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """See `quantized_weights`."""
    pairs = [_quantize_weight(w.detach()) for w in (gate_up, down)]
    swapped = [tuple(part.transpose(1, 2).contiguous() for part in pair) for pair in pairs]
    return tuple(part for pair in (*pairs, *swapped) for part in pair)


def _quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack in 128 x 128 blocks: as one tall matrix, since no block reaches into the next expert."""
    experts, rows, cols = weight.shape
    data, scales = phalanx.quantize(weight.reshape(experts * rows, cols), block=(128, 128))
    return data.view(experts, rows, cols), scales.view(experts, rows // 128, cols // 128)
