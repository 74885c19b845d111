"""The package itself: what importing it brings in, that stubs and sources agree, and the versions."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import phalanx
import pytest
from phalanx import _nvrtc

PACKAGE = Path(phalanx.__file__).parent
HEADERS = Path(__file__).parents[2] / "include" / "phalanx"


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_brings_in_no_array_library():
    code = "import sys, phalanx; print({'torch', 'numpy', 'jax', 'cupy', 'tvm_ffi'} & set(sys.modules))"
    assert python(code) == "set()"


def test_version_is_that_of_the_header():
    text = (HEADERS / "version.h").read_text()
    assert phalanx.version() == re.search(r'VERSION_STRING "(.*)"', text)[1]
    assert phalanx.__version__ == phalanx.version()


def test_unknown_attribute():
    assert not hasattr(phalanx, "gemm_fp4")


def test_stub_agrees_with_the_source():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    functions = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert {"gemm_fp8", "quantize", "dequantize", "version"} <= set(functions)
    for name, arguments in functions.items():
        parameters = inspect.signature(getattr(phalanx, name)).parameters.values()
        assert [a.arg for a in arguments.args] == [p.name for p in parameters]
        defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
        assert [ast.literal_eval(d) for d in arguments.defaults] == defaults
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    assert set(phalanx.__all__) == set(functions) | classes


def test_everything_public_is_documented():
    for name in phalanx.__all__:
        assert getattr(phalanx, name).__doc__


def test_a_missing_module_says_what_to_do(tmp_path):
    code = f"import os; os.environ['PHALANX_LIBRARY_DIR'] = {str(tmp_path)!r}; import phalanx; phalanx.version()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "ImportError" in result.stderr and "PHALANX_LIBRARY_DIR" in result.stderr


def test_a_missing_nccl_says_what_to_do():
    code = "import phalanx; phalanx.Group.nccl_id()"
    environment = os.environ | {"PHALANX_NCCL": "/nowhere/libnccl.so.2"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode != 0
    assert "UnsupportedError: NCCL is not available: /nowhere/libnccl.so.2" in result.stderr
    assert "PHALANX_NCCL" in result.stderr


@pytest.mark.parametrize("path", ["cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"])
def test_nvrtc_is_found_where_its_wheels_put_it(path, tmp_path, monkeypatch):
    library = tmp_path / "nvidia" / path
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    _nvrtc.hint_nvrtc()
    assert os.environ[_nvrtc.HINT] == str(library)


def test_the_hint_to_nvrtc_is_a_file_and_can_be_overruled():
    # tvm_ffi would import torch, which takes seconds.
    imports = "import os, sys; sys.modules['torch'] = None; import tvm_ffi; del sys.modules['torch']; import phalanx; "
    code = "phalanx.version(); print(os.environ.get('PHALANX_NVRTC_HINT', ''))"
    hint = python(imports + code)
    assert hint == "" or Path(hint).name.startswith("libnvrtc.so")
    assert python(imports + "os.environ['PHALANX_NVRTC_HINT'] = 'mine'; " + code) == "mine"
