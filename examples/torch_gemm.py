"""FP8 from PyTorch, eager and compiled, on the GPU if Phalanx has kernels for it. `pip install torch phalanx` first."""

import phalanx
import torch


class Fp8Linear(torch.nn.Module):
    """A linear layer without bias: the weight is quantised once, the input on the way."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        data, scales = phalanx.quantize(weight, block=(128, 128))
        self.register_buffer("data", data)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return phalanx.gemm_fp8(phalanx.quantize(x), (self.data, self.scales))


def main() -> None:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    device = "cuda" if hopper else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(64, 512, generator=generator, device=device, dtype=torch.bfloat16)
    weight = torch.randn(256, 512, generator=generator, device=device, dtype=torch.bfloat16)

    layer = Fp8Linear(weight)
    y = layer(x)
    exact = x.float() @ weight.float().T
    error = ((y.float() - exact).norm() / exact.norm()).item()
    print(f"torch on {device}: {list(x.shape)} x {list(weight.shape)}ᵀ in FP8 is {error:.2%} from FP32")
    assert error < 0.06

    # torch.compile sees the products as operators of its own graph. "eager" needs no compiler on this machine.
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), y), "the same input must give the same bits"
    print("torch.compile gives the same bits")


if __name__ == "__main__":
    main()
