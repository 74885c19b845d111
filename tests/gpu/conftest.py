"""Everything here needs a Hopper GPU and PyTorch."""

import pytest


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def arrays():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    from cases import TorchArrays

    return TorchArrays("cuda")
