"""The built library through library.py, and the variables that control it."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from rgexport.errors import RequestError
from rgexport.export.onnx.native import DOMAIN, VERSION
from rgexport.kernels.build import NOT_BUILT
from rgexport.kernels.onnx import library
from rgexport.kernels.rounding import library as rounding
from tests.kernels.onnx import programs
from tests.kernels.onnx.one_node import instruction_set_here, run_model
from tests.kernels.onnx.quant_matrix import random_matrix
from tests.kernels.onnx.test_quant_linear import activations

built = pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason)


def test_is_built_where_there_is_a_compiler():
    if library.turned_off() or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler, or turned off")
    assert library.library() == library.LIBRARY
    assert library.kernels().reason == ""


@built
def test_has_all_ops_of_the_table():
    table = (library.FOLDER / "src" / "register.cpp").read_text()
    classes = re.findall(r"row<(\w+)(?:<(\d)>)?>\(\),", table)
    names = {name + ("" if count == "1" else count) for name, count in classes}
    assert names and set(library.kernels().ops) == names


def test_a_worker_has_its_instruction_set(worker):
    assert worker.submit(instruction_set_here) == worker.instruction_set


@built
def test_instruction_sets_are_those_that_the_system_knows():
    """By the flags of /proc/cpuinfo, which the kernel writes from its own look at the processor."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("only x86 on Linux has such flags")
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    needed = {
        "scalar": set(),
        "avx2": {"avx2", "fma"},
        "avxvnni": {"avx2", "fma", "avx_vnni"},
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
        "amx": {"avx512_vnni", "amx_tile", "amx_int8"},
    }
    expected = [name for name, all_of_these in needed.items() if all_of_these <= flags]
    assert list(library.kernels().instruction_sets) == expected


@built
@pytest.mark.parametrize("word", ["avx", "AVX2", "none"])
def test_an_unknown_word_is_a_wrong_request(monkeypatch, word):
    monkeypatch.setenv(library.CPU, word)
    for asked in (library.library, library.kernels):
        with pytest.raises(RequestError, match=f"{library.CPU} .*{word!r}.*scalar"):
            asked()


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_can_be_turned_off(monkeypatch, value, off):
    monkeypatch.setenv(library.NO_NATIVE, value)
    assert library.turned_off() == off
    if off:
        assert library.library() is None and library.calls() == {}
        assert library.NO_NATIVE in library.kernels().reason


def test_says_why_there_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv(library.NO_NATIVE, raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    assert "rgexport.kernels.build" in library.kernels().reason
    (tmp_path / NOT_BUILT).write_text("no compiler")
    assert str(tmp_path / NOT_BUILT) in library.kernels().reason
    (tmp_path / "none.so").write_bytes(b"not a library")
    assert library.library() is None
    assert "cannot be loaded" in library.kernels().reason


def test_counts_calls_from_two_sessions_at_once(worker):
    """One process, two sessions, four runs each at a time: the kernels share nothing."""
    case = random_matrix(200, 300, 4, 32).case(activations(1, 40, 200))
    assert worker.submit(runs_at_once, case) == 8


def runs_at_once(case) -> int:
    """Runs in the worker: how many of eight runs gave the same as a run alone."""
    from concurrent.futures import ThreadPoolExecutor

    from tests.kernels.onnx.one_node import model, open_model

    sessions = [open_model(model(case)) for _ in range(2)]
    alone = sessions[0].run(None, {"x": case.inputs["x"]})[0]
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(sessions[i % 2].run, None, {"x": case.inputs["x"]}) for i in range(8)]
    return sum(bool((run.result()[0] == alone).all()) for run in runs)


def older_op(version: int) -> bytes:
    """A file with a RgLruScan of one input, as a file of another version might have it."""
    return onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["": 23, "{DOMAIN}": {version}]>
    older (float[N] x) => (float[N] y) {{ y = {DOMAIN}.RgLruScan (x) }}
    <domain: "{DOMAIN}", opset_import: ["": 23]>
    RgLruScan (a) => (b) {{ b = Neg (a) }}""").SerializeToString()


@built
def test_an_op_that_was_another_one_in_the_file_s_version_runs_its_body(worker):
    x = {"x": np.float32([1, -2])}
    found, ran = worker.submit(run_model, older_op(1), x, {}, {"y": (2,)})
    assert found["y"].tolist() == [-1, 2] and not any(ran.values())
    with pytest.raises(Exception, match="RgLruScan"):
        worker.submit(run_model, older_op(VERSION), x, {}, {"y": (2,)})


@built
@pytest.mark.full  # builds the library once more, for its objects
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_nothing_compiled_for_one_processor_runs_on_another():
    """A weak symbol of an AVX-512 object may replace the same one of an object for everybody."""
    for_some = re.compile(r"_(avx2|avxvnni|avx512|amx|neon|i8mm)\.")
    objects = [path for path in programs.native().rglob("*.o") if for_some.search(path.name)]
    assert objects
    for path in objects:
        listed = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True)
        weak = re.findall(r" [WVu] (.*)", listed.stdout)
        assert not weak, f"{path.name}: {weak}"


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's")
@pytest.mark.parametrize("path", [library.LIBRARY, rounding.LIBRARY], ids=["onnx", "rounding"])
def test_segments_are_aligned_to_pages_of_16_kb(path):
    """Android refuses others, and some Arm machines have such pages."""
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x02"  # 64 bits
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count)]
    loaded = [header for header in headers if header[0] == 1]
    assert loaded and all(alignment >= 1 << 14 for *_, alignment in loaded)
