"""The native libraries for Windows: cross-compiled by MinGW, and run by Wine.

They give what the libraries of this machine give. The kernels run in ONNX Runtime's own release for
Windows, which pip fetches into `out/`; without a network that test skips.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import pytest

from rgexport.kernels.build import PROJECTS, build, program
from rgexport.kernels.onnx import library
from rgexport.kernels.rounding import library as rounding
from tests.built import COMPILER, built, one_at_a_time
from tests.command_line import ROOT
from tests.kernels.onnx import programs
from tests.kernels.onnx.one_node import Case
from tests.kernels.onnx.quant_matrix import random_matrix
from tests.kernels.onnx.test_quant_linear import activations
from tests.kernels.onnx.test_several_runtimes import model_and_bits, norm, text_of

HERE = Path(__file__).parent
DRIVER = HERE / "rounding" / "levels_driver.cpp"
MINGW = "x86_64-w64-mingw32-g++-posix"
WINE = shutil.which("wine64") or shutil.which("wine64", path="/usr/lib/wine") or "wine64"
MISSING = [tool for tool in (COMPILER, MINGW, WINE) if not shutil.which(tool)]
LEVELS = [
    *sorted((rounding.LIBRARY.parent / "src").iterdir()),
    *(rounding.LIBRARY.parent / "CMakeLists.txt", programs.INCLUDED / "cpu.cpp"),
    *(programs.INCLUDED / "cpu.h", DRIVER, HERE / "load_library.h"),
]
"""The sources of the library of levels, and of the program that calls it."""
ROUNDED_TWICE = {"losses", "refined_losses"}
"""Results in float64 that need a correct `fma`: MinGW's own C library has none."""

SETS = "scalar", "avx2", "avx512"
"""The most that a test uses. Linux wants to be asked for AMX, which no program for Windows does."""


def linear() -> Case:
    return random_matrix(200, 300, 4, 32).case(activations(1, 3, 200))


OPS = {"RmsNorm": norm, "QuantLinear": linear}

needs_wine = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}")
pytestmark = pytest.mark.full


def _levels_for_windows(folder: Path) -> None:
    system = "-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=x86_64"
    build(rounding.LIBRARY.parent, folder, None, *system, f"-DCMAKE_CXX_COMPILER={MINGW}")
    flags = "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{HERE}", DRIVER
    for compiler, system in ((COMPILER, "-ldl"), (MINGW, "-static")):
        made = folder / ("levels.exe" if compiler == MINGW else "levels")
        subprocess.run([compiler, *flags, "-o", made, system], check=True)


def _kernels_for_windows(folder: Path) -> None:
    system = "-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=x86_64"
    build(library.FOLDER, folder, None, *system, f"-DCMAKE_CXX_COMPILER={MINGW}")
    made = folder / "several_runtimes.exe"
    programs.compile_several_runtimes(MINGW, made, "-static", "-D_stdcall=__stdcall")


def wine(*command: object, text: str = "", **variables: str) -> list[str]:
    """The lines that a program for Windows prints."""
    prefix = {"WINEPREFIX": str(ROOT / "out" / "wine"), "WINEDEBUG": "-all"}
    with one_at_a_time("wine"):
        done = subprocess.run(
            [WINE, *map(str, command)],
            input=text,
            env=os.environ | prefix | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout.splitlines()


def windows_path(path: Path) -> str:
    """A path of this machine as Wine's programs see it."""
    return "Z:" + str(path).replace("/", "\\")


def exports(path: Path) -> set[str]:
    """The names that a library for Windows exports."""
    dumped = subprocess.run(
        ["x86_64-w64-mingw32-objdump", "-p", path], capture_output=True, text=True, check=True
    )
    assert not re.search(r"DLL Name: lib", dumped.stdout), "it needs MinGW's own libraries"
    return set(re.findall(r"\+base\[ *\d+\] +\w+ (\w+)$", dumped.stdout, re.M))


@needs_wine
@pytest.mark.parametrize("cpu", SETS)
def test_levels_are_those_of_this_machine(cpu: str) -> None:
    folder = built(_levels_for_windows, LEVELS, compiler=MINGW)
    path = folder / "librgexport_rounding.dll"
    assert exports(path) == {f"rgexport_{name}" for name in rounding._SIGNATURES}
    command = [folder / "levels", rounding.LIBRARY]
    here = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    there = wine(folder / "levels.exe", windows_path(path), RGEXPORT_CPU=cpu)
    expected, results = (dict(line.split() for line in lines) for lines in (here, there))
    left_out = ROUNDED_TWICE if cpu == "scalar" else set()
    assert len(expected) == 8 and results.keys() == expected.keys()
    differing = {name for name in expected if results[name] != expected[name]}
    assert differing <= left_out


def windows_runtime() -> Path:
    """`onnxruntime.dll` of this machine's version, out of the wheel for Windows."""
    folder = ROOT / "out" / f"ort-windows-{onnxruntime.__version__}"
    with one_at_a_time(folder.name):
        if not (folder / "onnxruntime.dll").is_file():
            _fetch(folder)
    return folder / "onnxruntime.dll"


def _fetch(folder: Path) -> None:
    wanted = f"onnxruntime=={onnxruntime.__version__}"
    version = sysconfig.get_python_version()
    options = ["--platform", "win_amd64", "--only-binary=:all:", "--no-deps", "-q"]
    command = ["download", *options, "--python-version", version, "-d", str(folder), wanted]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{wanted} for Windows cannot be fetched: {done.stderr.strip()[-200:]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (folder / "onnxruntime.new").write_bytes(files.read("onnxruntime/capi/onnxruntime.dll"))
    wheel.unlink()
    (folder / "onnxruntime.new").rename(folder / "onnxruntime.dll")


@needs_wine
@pytest.mark.nightly  # MinGW compiles the kernels for minutes
@pytest.mark.skipif(not programs.ORT_HEADERS.is_dir(), reason="not installed: libonnxruntime-dev")
@pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason)
@pytest.mark.parametrize("cpu", SETS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_run_in_onnx_runtime_for_windows(op: str, cpu: str, tmp_path: Path) -> None:
    runtime, case = windows_runtime(), OPS[op]()
    folder = built(_kernels_for_windows, [*programs.LIBRARY, *programs.RUNTIMES], compiler=MINGW)
    path = folder / "librgexport_onnx.dll"
    assert {"RegisterCustomOps", "rgexport_op", "rgexport_calls"} <= exports(path)
    model, expected = model_and_bits(case)
    (tmp_path / "one.onnx").write_bytes(model)
    x = case.given["x"]
    kernels, file, dll = map(windows_path, (path, tmp_path / "one.onnx", runtime))
    command = folder / "several_runtimes.exe", kernels, file, x.shape[-1], dll
    version, bits, refusal, calls = wine(*command, text=text_of(x), RGEXPORT_CPU=cpu)
    assert version == onnxruntime.__version__
    assert bits == expected and f"{op}: " in refusal and calls == "2"


@pytest.mark.skipif(not shutil.which("clang"), reason="not installed: clang")
@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_clang_of_visual_studio_knows_every_flag(project: Path, tmp_path: Path) -> None:
    """It ignores flags that it does not know, such as that against contraction of sums."""
    compiler = tmp_path / "clang-cl"
    compiler.symlink_to(shutil.which("clang") or "")
    for command in _commands(project, tmp_path / "build", compiler):
        asked = [command[0], "-###", *command[1:]]
        done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and "warning:" not in done.stderr, done.stderr[-2000:]
        assert '"-O3"' in done.stderr and '"-fno-inline"' not in done.stderr, "a debug build"
        assert '"-ffp-contract=off"' in done.stderr or not _is_exact(command)


def _commands(project: Path, folder: Path, compiler: Path) -> Iterable[list[str]]:
    """The commands that CMake would run with clang-cl, which here has no library to link with."""
    settings = {
        "CMAKE_SYSTEM_NAME": "Windows",
        "CMAKE_SYSTEM_PROCESSOR": "AMD64",
        "CMAKE_CXX_COMPILER": str(compiler),
        "CMAKE_CXX_COMPILER_TARGET": "x86_64-pc-windows-msvc",
        "CMAKE_CXX_COMPILER_WORKS": "ON",
        "CMAKE_TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": str(program("ninja")),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    command = [str(program("cmake")), "-G", "Ninja", "-S", project, "-B", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    commands = folder / "compile_commands.json"
    assert commands.is_file(), done.stderr[-2000:]
    return [entry["command"].split() for entry in json.loads(commands.read_text())]


def _is_exact(command: list[str]) -> bool:
    """Whether a file's results must not depend on the processor."""
    return any("rounding" in word or "quant_matmul" in word for word in command)
