"""FP8 from JAX, on its default device. `pip install jax phalanx` first; jax-tvm-ffi too for calls inside jax.jit."""

import jax
import jax.numpy as jnp
import phalanx


def main() -> None:
    x_key, w_key = jax.random.split(jax.random.key(1))
    x = jax.random.normal(x_key, (64, 512), jnp.bfloat16)
    weight = jax.random.normal(w_key, (256, 512), jnp.bfloat16)

    y = phalanx.gemm_fp8(phalanx.quantize(x), phalanx.quantize(weight, block=(128, 128)), out_dtype=jnp.float32)
    exact = jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")
    error = float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))
    print(f"JAX on {jax.default_backend()}: {x.shape} x {weight.shape}ᵀ in FP8 is {error:.2%} from FP32")
    assert error < 0.06


if __name__ == "__main__":
    main()
