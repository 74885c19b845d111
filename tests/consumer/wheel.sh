#!/usr/bin/env bash
# Usage: tests/consumer/wheel.sh PYTHON BUILD_DIR
# Builds the wheel, unpacks it alone into a folder, and uses the package and its command from there.
set -euo pipefail

python=$1
build=$(realpath "$2")
source=$(realpath "$(dirname "$0")/../..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The build folder of its own is kept, so that a second time is quick.
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --config-settings "build-dir=$build/wheel" --wheel-dir "$work" "$source"
wheel=$(ls "$work"/*.whl)
echo "$(basename "$wheel"), $(du -h "$wheel" | cut -f1)"
[[ $wheel == *-py3-none-* ]] || { echo "the wheel is bound to one version of Python"; exit 1; }

"$python" -m zipfile -e "$wheel" "$work/site"
if grep -i '^Requires-Dist: torch' "$work"/site/*.dist-info/METADATA; then
  echo "the wheel requires torch"
  exit 1
fi

unset PHALANX_LIBRARY_DIR
export PYTHONPATH=$work/site
"$python" - <<'END'
import sys

sys.modules["torch"] = None  # tvm_ffi would import it, which takes seconds
import tvm_ffi  # noqa: F401

del sys.modules["torch"]

import numpy as np

import phalanx

assert phalanx.__file__.startswith(__import__("os").environ["PYTHONPATH"]), phalanx.__file__
x = np.ones((4, 256), np.float32)
d = phalanx.gemm_fp8(phalanx.quantize(x), phalanx.quantize(x, block=(128, 128)), out_dtype=np.float32)
assert np.allclose(d, 256), d
print("phalanx", phalanx.version(), "works from the wheel alone")
END
chmod +x "$work/site/phalanx/bin/phalanx"  # as installers do
"$python" -m phalanx --version
