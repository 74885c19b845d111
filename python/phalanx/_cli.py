"""The console script `phalanx`: becomes the C++ program of that name, which the wheel carries."""

import os
import sys

from phalanx._native import library_dir
from phalanx._nvrtc import hint_nvrtc


def main() -> None:
    program = library_dir() / "bin" / "phalanx"
    if not program.exists():
        sys.exit(f"phalanx: {program} does not exist; in a build tree, run src/cli/phalanx of it")
    hint_nvrtc()
    os.execv(program, [str(program), *sys.argv[1:]])
