"""The native libraries for Windows: cross-compiled by MinGW, and run by Wine.

They give what the libraries of this machine give. The kernels run in ONNX Runtime's own release for
Windows, which pip fetches into `out/`; without a network that test skips.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from rgexport.kernels.build import build
from rgexport.kernels.onnx import library
from rgexport.kernels.rounding import library as rounding
from tests.built import COMPILER, built, one_at_a_time
from tests.command_line import ROOT
from tests.kernels.onnx import programs
from tests.kernels.onnx.one_node import Case, model, run_model
from tests.kernels.onnx.quant_matrix import activations, random_matrix

HERE = Path(__file__).parent
DRIVER = HERE / "rounding" / "levels_driver.cpp"
MINGW = "x86_64-w64-mingw32-g++-posix"
WINE = shutil.which("wine64") or shutil.which("wine64", path="/usr/lib/wine") or "wine64"
MISSING = [tool for tool in (COMPILER, MINGW, WINE) if not shutil.which(tool)]
LEVELS = [*sorted((rounding.LIBRARY.parent / "src").iterdir()), *programs.LIBRARY, DRIVER]
SETS = "scalar", "avx2", "avx512"
"""The most that a test uses. Linux wants to be asked for AMX, which no program for Windows does."""
X = activations(1, 3, 200)
CASES = (
    Case("RmsNorm", {"x": X, "weight": X[0, 0]}, {"y": X.shape}, {}, frozenset({"weight"})),
    random_matrix(200, 300, 4, 32).case(X),
)
SYSTEM = (
    *("-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=x86_64"),
    f"-DCMAKE_CXX_COMPILER={MINGW}",
)
needs_wine = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}")
pytestmark = pytest.mark.full


def _levels_for_windows(folder: Path) -> None:
    build(rounding.LIBRARY.parent, folder, None, *SYSTEM)
    flags = "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{HERE}", DRIVER
    subprocess.run([COMPILER, *flags, "-o", folder / "levels", "-ldl"], check=True)
    subprocess.run([MINGW, *flags, "-o", folder / "levels.exe", "-static"], check=True)


def _kernels_for_windows(folder: Path) -> None:
    build(library.FOLDER, folder, None, *SYSTEM)
    programs.compile_several_runtimes(MINGW, folder, "-static", "-D_stdcall=__stdcall")


def wine(*command: object, text: str = "", **variables: str) -> list[str]:
    """The lines that a program for Windows prints."""
    prefix = {"WINEPREFIX": str(ROOT / "out" / "wine"), "WINEDEBUG": "-all"}
    options = {"env": os.environ | prefix | variables, "capture_output": True, "timeout": 300}
    with one_at_a_time("wine"):
        done = subprocess.run([WINE, *map(str, command)], input=text, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout.splitlines()


def windows_path(path: Path) -> str:
    """A path of this machine as Wine's programs see it."""
    return "Z:" + str(path).replace("/", "\\")


def exports(path: Path) -> set[str]:
    """The names that a library for Windows exports."""
    dumped = subprocess.check_output(["x86_64-w64-mingw32-objdump", "-p", path], text=True)
    assert "DLL Name: lib" not in dumped, "it needs MinGW's own libraries"
    return set(re.findall(r"\+base\[ *\d+\] +\w+ (\w+)$", dumped, re.M))


@needs_wine
@pytest.mark.parametrize("cpu", SETS)
def test_levels_are_those_of_this_machine(cpu: str) -> None:
    folder = built(_levels_for_windows, LEVELS, compiler=MINGW)
    path = folder / "librgexport_rounding.dll"
    assert exports(path) == {f"rgexport_{name}" for name in rounding._SIGNATURES}
    here = subprocess.check_output([folder / "levels", rounding.LIBRARY], text=True).splitlines()
    there = wine(folder / "levels.exe", windows_path(path), RGEXPORT_CPU=cpu)
    expected, results = (dict(line.split() for line in lines) for lines in (here, there))
    assert len(expected) == 9 and results.keys() == expected.keys()
    differing = {name for name in expected if results[name] != expected[name]}
    # Results in float64 need a correct `fma`, which MinGW's own C library does not have.
    assert differing <= ({"losses", "refined_losses"} if cpu == "scalar" else set())


@needs_wine
@pytest.mark.nightly  # MinGW compiles the kernels for minutes
@pytest.mark.skipif(not programs.ORT_HEADERS.is_dir(), reason="not installed: libonnxruntime-dev")
@pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason)
@pytest.mark.parametrize("cpu", SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_kernels_run_in_onnx_runtime_for_windows(case: Case, cpu: str, tmp_path: Path) -> None:
    folder = built(_kernels_for_windows, [*programs.LIBRARY, *programs.DRIVERS], compiler=MINGW)
    path = folder / "librgexport_onnx.dll"
    assert {"RegisterCustomOps", "rgexport_op", "rgexport_calls"} <= exports(path)
    (tmp_path / "one.onnx").write_bytes(model(case))
    bits = run_model(model(case), case)[0]["y"].view(np.uint32).ravel()
    text = " ".join(repr(float(value)) for value in X.ravel())  # is read back as it is
    release = programs.runtime(onnxruntime.__version__, "win_amd64")
    dll = release / "onnxruntime" / "capi" / "onnxruntime.dll"
    kernels, file, dll = map(windows_path, (path, tmp_path / "one.onnx", dll))
    command = folder / "several_runtimes.exe", kernels, file, X.shape[-1], dll
    version, result, refusal, calls = wine(*command, text=text, RGEXPORT_CPU=cpu)
    assert version == onnxruntime.__version__
    assert result == "".join(f"{word:08x}" for word in bits)
    assert f"{case.op}: " in refusal and calls == "2"
