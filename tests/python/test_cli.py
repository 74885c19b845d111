"""The command `phalanx`, as built."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(os.environ.get("PHALANX_LIBRARY_DIR", "build/python")).parent / "src/cli/phalanx"
SHAPES = Path(__file__).parents[1] / "cases/shapes.json"
DRIVER = PROGRAM.parents[2] / "tests/driver/libcuda.so.1"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason=f"{PROGRAM} is not built")

needs_driver = pytest.mark.skipif(not DRIVER.exists(), reason=f"{DRIVER} is not built")

PRETENDED = {"LD_LIBRARY_PATH": str(DRIVER.parent)}
NO_NVRTC = {"PHALANX_NVRTC": "/nonexistent/libnvrtc.so.13"}


def run(arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PROGRAM, *shlex.split(arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """Every kernel, from a warm-up that may take them from the cache."""
    folder = tmp_path_factory.mktemp("pack")
    result = run(f"warmup --out {folder}/pack --json {folder}/warmup.json")
    assert result.returncode == 0, result.stderr
    return folder / "pack"


def test_info_names_what_a_bug_report_needs(tmp_path):
    result = run("info --json", PHALANX_CACHE_DIR=str(tmp_path), PHALANX_LOG_LEVEL="error")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert {"version", "system", "cpu", "driver", "gpus", "nvrtc", "packs", "environment"} <= info.keys()
    assert info["cache"] == {"directory": str(tmp_path), "entries": 0, "bytes": 0}
    assert info["environment"]["PHALANX_LOG_LEVEL"] == "error"
    assert info["driver"]["available"] or info["driver"]["error"]


def test_info_tells_what_was_tuned(tmp_path):
    file = tmp_path / "tuned.json"
    row = {"gpu": "NVIDIA H200", "num_sms": 132, "m": 1, "n": 2112, "k": 7168, "out": "bf16", "config": "block_m=64"}
    file.write_text(json.dumps({"format": 1, "gemm_fp8": [row | {"us": 1.0, "planner_us": 2.0}]}))
    assert f"{file}: 1 choices" in run("info", PHALANX_TUNED=str(file)).stdout
    file.write_text("mine")
    text = run("info", PHALANX_TUNED=str(file))
    assert text.returncode == 0 and f"{file}: not what phalanx tune writes" in text.stdout
    none = json.loads(run("info --json", PHALANX_TUNED=str(tmp_path / "none")).stdout)["tuned"]
    assert none == {"file": str(tmp_path / "none"), "choices": 0, "error": ""}


def test_info_says_why_there_is_no_nvrtc():
    text = run("info", **NO_NVRTC).stdout
    assert "/nonexistent/libnvrtc.so.13" in text


def test_info_keeps_other_variables_private():
    assert "hunter2" not in run("info", SECRET="hunter2").stdout


def test_warmup_lists_every_kernel(pack):
    kernels = json.loads((pack.parent / "warmup.json").read_text())["kernels"]
    assert len(kernels) > 12
    assert len({kernel["name"] for kernel in kernels}) == len(kernels)
    for kernel in kernels:
        assert kernel["seconds"] > 0 and kernel["registers"] > 0, kernel
        assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0 and not kernel["warnings"] and not kernel["error"]


def test_tune_says_what_it_lacks(tmp_path):
    result = run("tune 64x7168", PHALANX_TUNED=str(tmp_path / "tuned.json"))
    assert result.returncode == 1 and "64x7168; expected MxNxK" in result.stderr
    (tmp_path / "tuned.json").write_text("mine")
    result = run("tune 64x128x128", PHALANX_TUNED=str(tmp_path / "tuned.json"))
    assert result.returncode == 1 and "not what phalanx tune writes" in result.stderr
    assert (tmp_path / "tuned.json").read_text() == "mine"


@needs_driver
def test_tune_fails_without_nvrtc_and_says_so_once(tmp_path):
    there = {"PHALANX_TUNED": str(tmp_path / "tuned.json"), "PHALANX_CACHE_DIR": str(tmp_path), **PRETENDED, **NO_NVRTC}
    result = run("tune 64x512x512", PHALANX_PACK_PATH="", **there)
    assert result.returncode == 1
    assert result.stderr.startswith("phalanx: PHALANX_NVRTC is '/nonexistent/libnvrtc.so.13'")
    assert result.stderr.count("PHALANX_NVRTC is") == 1


@needs_driver
def test_tune_keeps_what_is_faster_and_products_use_it(tmp_path):
    """Over the driver that pretends, where a kernel takes a microsecond for each of its CTAs."""
    there = {"PHALANX_TUNED": str(tmp_path / "tuned.json"), **PRETENDED}
    result = run("tune 64x2112x7168 --rounds 3", **there)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "tuned.json").read_text())["gemm_fp8"]
    assert (row["gpu"], row["num_sms"], row["m"], row["n"], row["k"]) == ("Pretended H200", 132, 64, 2112, 7168)
    assert row["us"] < row["planner_us"]
    line = next(line for line in result.stdout.splitlines() if "2112" in line)
    assert float(line.split()[3]) == pytest.approx(row["planner_us"], abs=0.01)
    kernel = line.split()[-1]

    def kernels_used(shape: str, cache: str, **environment: str) -> str:
        """What a process compiles whose cache is empty."""
        own = {"PHALANX_CACHE_DIR": str(tmp_path / cache), "PHALANX_LOG_LEVEL": "info"}
        result = run(f"bench --device cuda {shape} --repeats 1 --seconds 0", **there, **own, **environment)
        assert result.returncode == 0, result.stderr
        return result.stderr

    assert f"compiled {kernel} " in kernels_used("--m 64 --n 2112 --k 7168", "tuned")
    assert f"compiled {kernel} " not in kernels_used("--m 64 --n 2112 --k 7040", "another")


@needs_driver
def test_tunes_at_once_keep_the_choices_of_all(tmp_path):
    there = {**os.environ, "PHALANX_TUNED": str(tmp_path / "tuned.json"), **PRETENDED}
    columns = [2112, 2240, 2368]
    arguments = [["tune", f"64x{n}x7168", f"32x{n}x7168", "--rounds", "1"] for n in columns]
    tunes = [subprocess.Popen([PROGRAM, *words], stdout=subprocess.DEVNULL, env=there) for words in arguments]
    assert [tune.wait() for tune in tunes] == [0, 0, 0]
    rows = json.loads((tmp_path / "tuned.json").read_text())["gemm_fp8"]
    assert sorted((row["m"], row["n"]) for row in rows) == [(m, n) for m in (32, 64) for n in columns]
    assert list(tmp_path.iterdir()) == [tmp_path / "tuned.json"]


def test_pack_serves_where_there_is_no_nvrtc(pack, tmp_path):
    there = {"PHALANX_CACHE_DIR": str(tmp_path / "cache"), **NO_NVRTC}
    result = run("warmup --json -", PHALANX_PACK_PATH=str(pack), **there)
    assert result.returncode == 0, result.stderr
    assert {kernel["origin"] for kernel in json.loads(result.stdout)["kernels"]} == {"pack"}


def test_warmup_fails_without_nvrtc_and_says_so_once(tmp_path):
    result = run("warmup", PHALANX_CACHE_DIR=str(tmp_path), PHALANX_PACK_PATH="", **NO_NVRTC)
    assert result.returncode == 1
    assert result.stderr.count("/nonexistent/libnvrtc.so.13' cannot") <= 1
    assert "/nonexistent/libnvrtc.so.13" in result.stderr


def test_cache_shows_and_clears(pack):
    here = {"PHALANX_CACHE_DIR": str(pack.parent / "cache")}
    assert run(f"warmup --out {pack.parent}/cache").returncode == 0  # a pack and a cache are laid out alike
    shown = json.loads(run("cache show --json", **here).stdout)
    assert len(shown["entries"]) > 12
    assert shown["bytes"] == sum(entry["bytes"] for entry in shown["entries"])
    cleared = run("cache clear", **here)
    assert cleared.returncode == 0 and str(len(shown["entries"])) in cleared.stdout
    assert json.loads(run("cache show --json", **here).stdout)["entries"] == []


def test_bench_times_one_shape_on_the_cpu():
    result = run("bench --device cpu --m 3 --n 20 --k 144 --repeats 2 --seconds 0 --out-dtype f32 --json -")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["shape"] == {"m": 3, "n": 20, "k": 144, "out": "f32"}
    assert row["median_us"] > 0
    assert row["tflops"] == pytest.approx(2 * 3 * 20 * 144 / row["median_us"] * 1e-6)


def test_bench_lists_every_set_of_shapes():
    sets = ", ".join(json.loads(SHAPES.read_text()))
    assert sets in " ".join(run("bench --help").stdout.split())
    assert f"expected one of {sets}" in run("bench --device cpu --set nothing").stderr


def test_bench_ep_times_ranks_on_the_cpu():
    shape = "--ranks 3 --tokens 5 --hidden 144 --experts 7 --topk 2"
    result = run(f"bench ep --device cpu {shape} --repeats 2 --json -")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["ranks"] == 3
    dispatch, _, combine = measured["rows"]
    assert (dispatch["op"], combine["op"]) == ("dispatch bf16", "combine bf16")
    assert dispatch["gbps"] == pytest.approx(5 * 2 * 288 / dispatch["median_us"] * 1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("bench ep --device cpu --topk 3 --experts 2", "--topk: 3"),
        ("bench ep --device cpu --hidden 9", "hidden is 9"),
        ("bench --device tpu", "--device: tpu"),
        ("bench --set nothing", "--set: nothing"),
        ("bench --m 4", "--m requires"),
        ("bench --m 0 --n 1 --k 1", "--m"),
        ("bench --device cuda:99", "cuda"),
        ("bench --device cuda:0x", "--device: cuda:0x"),
        ("bench --device cuda:-1", "--device: cuda:-1"),
        ("bench --device cuda:4294967296", "--device: cuda:4294967296"),
        ("bench --m 4294967297 --n 1 --k 1", "--m"),
        ("tune 4294967360x512x512", "4294967360x512x512; expected MxNxK"),
        ("tune 99999999999x5x5", "99999999999x5x5; expected MxNxK"),
        ("tune 64x-1x512", "64x-1x512; expected MxNxK"),
        ("tune '64x 512x512'", "64x 512x512; expected MxNxK"),
        ("tune 64x512x512x", "64x512x512x; expected MxNxK"),
        ("warmup --jobs -1", "--jobs"),
        ("cache", "subcommand"),
        ("frobnicate", "frobnicate is no subcommand"),
        ("cache frobnicate", "frobnicate is no subcommand"),
        ("--frobnicate", "--frobnicate"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    result = run(arguments)
    assert result.returncode != 0
    assert named in result.stderr + result.stdout


@pytest.mark.parametrize(
    "command", ["bench --device cpu --m 1 --n 16 --k 16 --repeats 1 --seconds 0", "warmup --fresh"]
)
@pytest.mark.parametrize("path", ["/nonexistent/x.json", "/dev/full"])
def test_unwritable_json_is_an_error(command, path):
    result = run(f"{command} --json {path}")
    assert result.returncode == 1 and f"cannot write {path}" in result.stderr
