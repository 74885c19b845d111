"""The array libraries: one small file each, imported when the first array of that library is seen."""

from typing import Any

from phalanx._frameworks.base import Framework

by_type: dict[type, Framework] = {}  # filled by the libraries' modules, for a quick way


def of(array: Any, name: str) -> Framework:
    """The framework that `array`, an argument called `name`, belongs to."""
    return by_type.get(type(array)) or _find(array, name)


def _find(array: Any, name: str) -> Framework:
    framework: Framework
    for cls in type(array).__mro__:
        library = cls.__module__.split(".")[0]
        if library == "torch":
            from phalanx.torch import framework
        elif library == "numpy":
            from phalanx._frameworks.numpy import framework
        elif library == "cupy":
            from phalanx._frameworks.cupy import framework
        elif library in ("jax", "jaxlib"):
            from phalanx._frameworks.jax import framework_of

            framework = framework_of(array)
        else:
            continue
        return framework
    raise TypeError(f"{name}: expected an array of PyTorch, CuPy, JAX or NumPy, got {type(array).__name__}")
