"""The library: how it is built, the variables that control it, its sessions, and other releases."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from rgexport.artifacts.onnx.model_file import DOMAIN, VERSION
from rgexport.errors import RequestError
from rgexport.kernels.build import NOT_BUILT, BuildFailed, build
from rgexport.kernels.onnx import library
from rgexport.kernels.rounding import library as rounding
from tests.artifacts import export_demo
from tests.command_line import ROOT
from tests.kernels.onnx import programs
from tests.kernels.onnx.one_node import Case, different_results, run_model
from tests.kernels.onnx.quant_matrix import activations, random_matrix
from tests.kernels.onnx.test_float_ops import positions, scan_case
from tests.sessions import distance

built = pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason)


def test_a_worker_has_its_instruction_set(worker):
    assert worker.submit(library.kernels).instruction_set == worker.instruction_set


@built
def test_instruction_sets_are_those_that_the_system_knows():
    """By the flags of /proc/cpuinfo, which the kernel writes from its own look at the processor."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("only x86 on Linux has such flags")
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    vectors = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma"}
    tiles = {"avx512_vnni", "amx_tile", "amx_int8"}
    needed = {"scalar": set(), "avx2": {"avx2", "fma"}, "avxvnni": {"avx2", "fma", "avx_vnni"}}
    needed |= {"avx512": vectors, "amx": tiles}
    expected = [name for name, all_of_these in needed.items() if all_of_these <= flags]
    assert list(library.kernels().instruction_sets) == expected


@built
def test_variables_control_it(monkeypatch):
    monkeypatch.setenv(library.CPU, "AVX2")
    with pytest.raises(RequestError, match=f"{library.CPU} .*'AVX2'.*scalar"):
        library.kernels()
    monkeypatch.delenv(library.CPU)
    for value, off in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv(library.NO_NATIVE, value)
        assert (library.library() is None) == (library.NO_NATIVE in library.kernels().reason) == off


def test_says_why_there_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv(library.NO_NATIVE, raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    assert "rgexport.kernels.build" in library.kernels().reason
    (tmp_path / NOT_BUILT).write_text("no compiler")
    assert str(tmp_path / NOT_BUILT) in library.kernels().reason
    (tmp_path / "none.so").write_bytes(b"not a library")
    assert library.library() is None and "cannot be loaded" in library.kernels().reason


def test_sessions_at_once_share_nothing_and_no_way_of_reading_weights_changes_a_bit(worker):
    """The ways take turns until one is chosen."""
    case = random_matrix(200, 300, 4, 32).case(activations(1, 40, 200))
    assert worker.submit(different_results, case, 9, 2, 8) == 1
    linear = random_matrix(2048, 1100, 4, 128).case(activations(1, 1, 2048))
    for case in (linear, scan_case(1, 1, 4, 256, positions(1, 1, 7))):
        assert worker.submit(different_results, case, 300, 1) == 1


@built
def test_an_op_that_was_another_one_in_the_file_s_version_runs_its_body(worker):
    """The file has a RgLruScan of one input, as a file of another version might have it."""
    text = f"""
    <ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1]>
    older (float[N] x) => (float[N] y) {{ y = {DOMAIN}.RgLruScan (x) }}
    <domain: "{DOMAIN}", opset_import: ["": 23]>
    RgLruScan (a) => (b) {{ b = Neg (a) }}"""
    case = Case("RgLruScan", {"x": np.float32([1, -2])}, {"y": (2,)})
    older = onnx.parser.parse_model(text)
    outputs, ran = worker.submit(run_model, older.SerializeToString(), case)
    assert outputs["y"].tolist() == [-1, 2] and not any(ran.values())
    older.opset_import[1].version = VERSION
    with pytest.raises(Exception, match="RgLruScan"):
        worker.submit(run_model, older.SerializeToString(), case)


@programs.needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds a process to processors")
def test_work_is_shared_among_the_processors_of_the_process():
    program = programs.processors() / "processors"
    bind = functools.partial(os.sched_setaffinity, 0, [min(os.sched_getaffinity(0))])
    assert subprocess.check_output([program], preexec_fn=bind, text=True) == "1\n"


@built
@pytest.mark.full  # builds the library once more, for its objects
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_nothing_compiled_for_one_processor_runs_on_another():
    """A weak symbol of an AVX-512 object may replace the same one of an object for everybody."""
    for_some = re.compile(r"_(avx2|avxvnni|avx512|amx|neon|i8mm)\.")
    folder = programs.native(*library.kernels().instruction_sets)
    objects = [path for path in folder.rglob("*.o") if for_some.search(path.name)]
    assert objects
    for path in objects:
        listed = subprocess.check_output(["nm", "-C", path], text=True)
        assert not re.findall(r" [WVu] (.*)", listed), path.name


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="no readelf")
@pytest.mark.parametrize("path", [library.LIBRARY, rounding.LIBRARY], ids=["onnx", "rounding"])
def test_segments_are_aligned_to_pages_of_16_kb(path):
    """Android refuses others, and some Arm machines have such pages."""
    listed = subprocess.check_output(["readelf", "-lW", path], text=True)
    alignments = re.findall(r"LOAD .* (0x\w+)$", listed, re.M)
    assert alignments and min(int(word, 16) for word in alignments) >= 1 << 14


def test_says_that_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildFailed, match="no-such-compiler"):
        build(library.FOLDER, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.nightly  # compiles the kernels anew
@pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason)
def test_a_wheel_has_the_library_and_its_platform(tmp_path):
    asked = ["wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True)
    if "Could not find a version" in done.stderr:
        pytest.skip(f"what builds the wheel is not to be had: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert path.name.endswith(f"-py3-none-{platform}.whl")
    made = zipfile.ZipFile(path)
    assert f"rgexport/kernels/rounding/{rounding.LIBRARY.name}" in made.namelist()
    assert "rgexport/web_page/page.zip" in made.namelist() or not shutil.which("npm")
    made.extractall(tmp_path / "installed")
    code = "from rgexport.kernels.onnx.library import *; print(LIBRARY, *kernels().ops)"
    variables = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", code]
    path, *ops = subprocess.check_output(command, env=variables, cwd=tmp_path, text=True).split()
    assert path.startswith(str(tmp_path)) and tuple(ops) == library.kernels().ops


VERSIONS = ["1.23.0", "1.27.0"]
"""Of ONNX Runtime: the oldest that pyproject.toml allows, and one between it and the newest."""
PROGRAM = """
import json, sys
import numpy as np
import onnxruntime as ort
from rgexport.artifacts.opening import open_artifact
from rgexport.kernels.onnx.library import calls
from rgexport.runtimes.onnx.session import OrtSession
session = OrtSession(open_artifact(sys.argv[1]), threads=2)
tokens = np.random.default_rng(8).integers(0, session.vocab_size, (1, 45))
chunks = np.split(tokens, [1, 41, 44], axis=1)
np.save(sys.argv[2], np.concatenate([session.prefill(t, t.shape[1]) for t in chunks], 1))
print(json.dumps([ort.__version__, sum(calls().values())]))
"""


def logits(artifact: Path, native: bool, version: str | None) -> np.ndarray:
    """By the current release or another one, with its own kernels or ours."""
    paths = [str(ROOT)] if version is None else [str(programs.runtime(version)), str(ROOT)]
    more = {"PYTHONPATH": os.pathsep.join(paths), library.NO_NATIVE: "" if native else "1"}
    target = artifact.with_suffix(".npy")
    command = [sys.executable, "-c", PROGRAM, str(artifact), str(target)]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    release, calls = json.loads(done.stdout.splitlines()[-1])
    assert version in (None, release) and (calls > 0) == native
    return np.load(target)


@pytest.mark.nightly  # takes a network
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("native", [False, True], ids=["stock", "native"])
def test_logits_are_those_of_the_current_release(version, native, tmp_path):
    """With int8 activations, only until a code is rounded the other way."""
    if native and not library.kernels().ops:
        pytest.skip(library.kernels().reason)
    for options, most in ((["--exact"], 45), ([], 4)):
        export_demo(tmp_path / str(most), "onnx", "--int4", *options)
        both = (logits(tmp_path / str(most), native, release) for release in (None, version))
        assert distance(*(result[:, :most] for result in both)) < 1e-3
