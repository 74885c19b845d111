"""FP8 from CuPy, on an H100 or H200. `pip install cupy-cuda13x phalanx` first."""

import cupy
import phalanx


def main() -> None:
    rng = cupy.random.default_rng(1)
    x = rng.standard_normal((64, 512), dtype=cupy.float32)
    weight = rng.standard_normal((256, 512), dtype=cupy.float32)

    # CuPy has no E4M3 type: the quantised data are its bytes, as uint8.
    a, b = phalanx.quantize(x), phalanx.quantize(weight, block=(128, 128))
    y = phalanx.gemm_fp8(a, b, out_dtype=cupy.float32)
    exact = x @ weight.T
    error = float(cupy.linalg.norm(y - exact) / cupy.linalg.norm(exact))
    print(f"CuPy: {x.shape} x {weight.shape}ᵀ in FP8 is {error:.2%} from FP32")
    assert error < 0.06


if __name__ == "__main__":
    main()
