"""Finds the NVRTC of the wheels `nvidia-cuda-nvrtc` and `nvidia-cuda-nvrtc-cu12`, which no dynamic loader knows of."""

import importlib.util
import os
from pathlib import Path

HINT = "PHALANX_NVRTC_HINT"  # one more place where the library looks; PHALANX_NVRTC comes first


def hint_nvrtc() -> None:
    """Sets PHALANX_NVRTC_HINT in the environment, unless it is set or there is no such wheel."""
    if HINT in os.environ:
        return
    nvidia = importlib.util.find_spec("nvidia")
    for root in (nvidia.submodule_search_locations or ()) if nvidia else ():
        for path in (Path(root, "cu13/lib/libnvrtc.so.13"), Path(root, "cuda_nvrtc/lib/libnvrtc.so.12")):
            if path.exists():
                os.environ[HINT] = str(path)
                return
