"""JAX inside jax.jit: operations as custom calls, which XLA makes with its own buffers, in its own stream.

jax-tvm-ffi brings them from XLA to `_call_native`, which runs whenever a compiled function does (Python's lock is taken
for it: some 10 us). What is wrong with operands is found then, before anything is enqueued, and JAX raises it as an
error of its own, JaxRuntimeError as a rule, with the text.

XLA knows no strides: what is best MN-major, scales of 1 x 128 blocks, travels as its transpose, which costs nothing
between a quantisation and a product of the same function.
"""

from functools import cache
from hashlib import blake2b
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tvm_ffi

from phalanx import _native
from phalanx._frameworks.jax import Jax


class _Place(NamedTuple):
    """Where among XLA's operands or results an argument is found, and whether as its transpose."""

    is_result: bool
    index: int
    turned: bool


class _Recipe(NamedTuple):
    """A call of the module."""

    name: str
    num_operands: int
    arguments: tuple[Any, ...]  # places and constants

    def key(self) -> int:
        """The same in every process, as XLA keeps compiled functions on disk."""
        return int.from_bytes(blake2b(repr(self).encode(), digest_size=8).digest(), "little", signed=True)


_recipes: dict[int, _Recipe] = {}  # of all calls that were traced


class _Result:
    """A new array, before there is one."""

    def __init__(self, shape, strides, dtype):
        self.shape, self.dtype = shape, dtype
        self.mn_major = len(shape) > 1 and strides[-1] != 1
        self.array = None

    def declared(self):
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.mn_major else self.shape
        return jax.ShapeDtypeStruct(shape, self.dtype)


class TracedJax(Jax):
    """Of one call: an operation's eager way leads here to a custom call, with results that are filled in then."""

    def empty(self, shape, strides, dtype, like):
        return _Result(shape, strides, dtype)

    def view(self, array):
        if not isinstance(array, (jax.Array, np.ndarray, _Result)):
            raise TypeError(f"expected an array of JAX inside jax.jit, got {type(array).__name__}")
        return array

    def stream(self, like):
        raise TypeError("cannot be traced by jax.jit, grad or vmap yet: call it outside")

    def device_of(self, like):
        return self.stream(like)

    def run(self, name, arguments, like, out):
        operands, results, places = [], [], []
        for before, argument in zip((None, *arguments), arguments, strict=False):
            if isinstance(argument, _Result):
                places.append(_Place(True, len(results), argument.mn_major))
                results.append(argument)
            elif isinstance(argument, (jax.Array, np.ndarray)):
                turned = _are_scales_by_row(before, argument)
                places.append(_Place(False, len(operands), turned))
                operands.append(jnp.swapaxes(argument, -1, -2) if turned else argument)
            else:
                places.append(argument)
        recipe = _Recipe(name, len(operands), tuple(places))
        _recipes[recipe.key()] = recipe

        declared = [result.declared() for result in results]
        arrays = jax.ffi.ffi_call(_target(), declared)(*operands, recipe=np.int64(recipe.key()))
        for result, array in zip(results, arrays, strict=True):
            result.array = jnp.swapaxes(array, -1, -2) if result.mn_major else array
        return jax.tree.map(lambda leaf: leaf.array if isinstance(leaf, _Result) else leaf, out)


def _are_scales_by_row(data, scales) -> bool:
    """Whether an argument is the scales of the one before it, of which each row has some."""
    return (
        isinstance(data, (jax.Array, np.ndarray))
        and data.dtype == jnp.float8_e4m3fn
        and scales.dtype == jnp.float32
        and scales.ndim > 1
        and scales.shape[:-1] == data.shape[:-1]
    )


def _target() -> str:
    """The name under which XLA knows `_call_native`."""
    with _registering:
        return _register()


_registering = Lock()  # `cache` alone would let several threads in


@cache
def _register() -> str:
    try:
        import jax_tvm_ffi
    except ImportError:
        raise ImportError("phalanx inside jax.jit needs jax-tvm-ffi: pip install jax-tvm-ffi") from None
    name, call = "phalanx", tvm_ffi.convert(_call_native)
    for platform in ("cpu", "gpu"):
        jax_tvm_ffi.register_ffi_target(name, call, ["attrs.recipe", "args", "rets"], platform=platform)
    return name


# --- what XLA calls ---------------------------------------------------------------------------------------------------


def _call_native(key, *arrays):
    """`arrays` are operands, then results."""
    recipe = _recipes.get(key)
    if recipe is None:
        raise RuntimeError("phalanx: a function that another process compiled; trace it in this one")

    def value(argument):
        if not isinstance(argument, _Place):
            return argument
        array = arrays[argument.index + (recipe.num_operands if argument.is_result else 0)]
        return _transposed(array) if argument.turned else array

    getattr(_native, recipe.name)(*map(value, recipe.arguments), None)


def _transposed(array):
    """A view of a matrix, or a stack of them, that XLA handed over: rows become columns."""
    *stack, rows, cols = array.shape
    strides = (*(rows * cols for _ in stack), 1, cols)
    return _native.view(array.data_ptr(), array.dtype, (*stack, cols, rows), strides, array.device)
