#!/usr/bin/env python3
"""Checks who includes whom: the table of docs/tour.md, kept by a tool and not by goodwill.

Looks up every #include of a C++ or CUDA file in the rules of its room. Names each line that breaks one
and exits with 1.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')

# Device headers that the host compiles too are named .h; those that only NVRTC sees, .cuh.
SHARED_DEVICE = r"device/.*\.h"

# What every room of device code may use.
BASICS = r"device/(types|divisor)\.h"

# Directory -> what its files may include of the project (matched whole). First match wins.
PROJECT_RULES: list[tuple[str, list[str]]] = [
    ("device/ptx", [BASICS, r"device/ptx/.*"]),
    ("device/gemm", [BASICS, r"device/(ptx|gemm)/.*"]),
    # Few tokens are quantised on their way, and gates and ups in their product's epilogue.
    (
        "device/moe",
        [
            BASICS,
            r"device/gemm/(params\.h|gemm_fp8\.cuh)",
            r"device/quantize/(params\.h|encode\.cuh|swiglu_pieces\.cuh)",
            r"device/(ptx|moe)/.*",
        ],
    ),
    ("device/quantize", [BASICS, r"device/(ptx|quantize)/.*"]),
    # Dispatch quantises with the quantiser's constants.
    (
        "device/ep",
        [BASICS, r"device/quantize/(config\.h|encode\.cuh)", r"device/(ptx|moe|ep)/.*"],
    ),
    ("bench/probe", [BASICS, r"device/ptx/.*"]),
    ("device", [BASICS]),
    ("include", [r"phalanx/.*"]),
    ("src/text", [r"text/.*"]),
    ("src/ops", [r"phalanx/.*", r"(ops|plan|jit|cuda|ep|cpu|text)/.*", SHARED_DEVICE]),
    ("src/plan", [r"(plan|text)/.*", SHARED_DEVICE]),
    (
        "src/jit",
        [r"(jit|text)/.*", r"plan/(plan|grouped|bf16)\.h", r"phalanx/(status|version|export)\.h", SHARED_DEVICE],
    ),
    ("src/cuda", [r"(cuda|text)/.*", r"phalanx/.*", SHARED_DEVICE]),
    ("src/ep", [r"(ep|cuda|text)/.*", r"phalanx/.*", SHARED_DEVICE]),
    ("src/cpu", [r"cpu/.*", r"phalanx/.*", SHARED_DEVICE]),
    ("src/cli", [r"(cli|cuda|jit|plan|text)/.*", r"phalanx/.*"]),
    ("python", [r"phalanx/.*", r"bindings/.*"]),
    ("examples/kernels", [r"phalanx/.*", r"examples/kernels/.*", r"(cuda|jit)/.*", r"device/ptx/.*"]),
    ("examples", [r"phalanx/.*", r"memory\.h"]),
    ("tests/consumer", [r"phalanx/.*"]),
    ("tests", [r".*"]),
]

# Headers in <> that a room never sees. Everywhere: the CUDA toolkit's, as the driver and NVRTC are loaded at run time.
CUDA = r"(cuda|nvrtc|cublas|cudnn|cute/|cutlass|mma)[\w./]*"
FRAMEWORK = r"(torch|ATen|c10|tvm|pybind11|Python)[\w./]*"
FOREIGN_RULES: list[tuple[str, str]] = [
    ("device", r".*"),
    ("include", r"(?![a-z_]+$).*"),  # only the standard library, whose headers are one bare word
    ("python", CUDA),
    ("tests", FRAMEWORK),  # one compares our declarations with <cuda.h>, where there is one
    ("", rf"{CUDA}|{FRAMEWORK}"),
]

OPERATION = re.compile(r"ops/(gemm|quantize|dequantize)\w*\.h")


def rule_of(path: str, rules: list[tuple[str, object]]) -> object | None:
    """The rule of the innermost room that holds `path`."""
    return next((rule for room, rule in rules if not room or path.startswith(room + "/")), None)


def fault(path: str, bracket: str, header: str) -> str | None:
    """Why `path` may not include `header`, or None."""
    room = path.rsplit("/", 1)[0]
    if bracket == "<":
        forbidden = rule_of(path, FOREIGN_RULES)
        return f"{room} may not include <{header}>" if re.fullmatch(forbidden, header) else None
    allowed = rule_of(path, PROJECT_RULES)
    if allowed is None:
        return f"no rule for {room}: add one to tools/check_includes.py"
    if not any(re.fullmatch(pattern, header) for pattern in allowed):
        return f'{room} may not include "{header}"'
    if path.startswith("src/ops/") and OPERATION.fullmatch(header) and Path(header).stem != Path(path).stem:
        return f'an operation may not include another: "{header}"'
    return None


def main() -> int:
    faults, count = [], 0
    rooms = sorted({room.split("/")[0] for room, _ in PROJECT_RULES})
    files = [f for room in rooms for f in sorted((ROOT / room).rglob("*")) if f.suffix in SUFFIXES]
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if match := INCLUDE.match(line):
                count += 1
                if why := fault(path, *match.groups()):
                    faults.append(f"{path}:{number}: {why}")
    print("\n".join(faults) if faults else f"{count} includes in {len(files)} files keep to their rooms")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
