"""The array libraries that serve the cases on the CPU."""

import pytest
from cases import NumPyArrays, TorchArrays


@pytest.fixture(params=["numpy", "torch"])
def arrays(request):
    if request.param == "numpy":
        return NumPyArrays()
    pytest.importorskip("torch")
    return TorchArrays("cpu")
