"""The library is built when the package is installed; without a compiler, the rest is installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from rgexport.kernels.build import NOT_BUILT, PROJECTS, BuildFailed, _generator, build
from rgexport.kernels.onnx import library
from rgexport.kernels.rounding import library as rounding
from tests.built import COMPILER, built
from tests.command_line import ROOT
from tests.kernels.onnx import programs

NO_COMPILER = "no-such-compiler"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
PACKAGE = library.FOLDER.parents[1]
OF_A_WHEEL = [
    *programs.LIBRARY,
    *(ROOT / name for name in ("pyproject.toml", "hatch_build.py")),
    *sorted(PACKAGE.glob("*.py")),
    *sorted(library.FOLDER.glob("*.py")),
    *sorted(rounding.LIBRARY.parent.rglob("*.*")),
]
"""The files that decide whether a wheel has a library that can be loaded."""


def test_says_that_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", NO_COMPILER)
    with pytest.raises(BuildFailed, match=NO_COMPILER):
        build(library.FOLDER, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_says_that_there_is_no_cmake(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildFailed, match="CMake"):
        build(library.FOLDER, tmp_path / "target")


def test_windows_takes_clang_of_visual_studio(monkeypatch):
    """Ninja would take a GCC of the path, whose own libraries users do not have."""
    monkeypatch.setattr(sys, "platform", "win32")
    for variable in ("CXX", "CMAKE_GENERATOR"):
        monkeypatch.delenv(variable, raising=False)
    assert _generator() == ["-T", "ClangCL"]
    monkeypatch.setenv("CMAKE_GENERATOR", "Ninja")
    assert _generator() == []


def test_a_broken_source_leaves_the_library_that_is_there(monkeypatch, tmp_path):
    sources = shutil.copytree(library.FOLDER / "src", tmp_path / "sources" / "src")
    shutil.copy(library.FOLDER / "CMakeLists.txt", tmp_path / "sources")
    (sources / "cpu.cpp").write_text("this is not C++")
    there = tmp_path / library.LIBRARY.name
    there.write_text("the one before")
    with pytest.raises(BuildFailed, match=r"cpu.cpp"):
        build(tmp_path / "sources", tmp_path)
    assert there.read_text() == "the one before"


def wheel(folder: Path, compiler: str = COMPILER) -> None:
    """Builds a wheel of the project as pip does it for a user; without a network, skips."""
    asked = ["wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    command = [sys.executable, "-m", "pip", *asked]
    variables = os.environ | {"CXX": compiler}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if "Could not find a version" in done.stderr:
        pytest.skip(f"what builds the wheel is not to be had: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.nightly  # compiles the kernels anew
@pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason)
def test_a_wheel_has_the_library_and_its_platform(tmp_path):
    (made,) = built(wheel, OF_A_WHEEL).glob("*.whl")
    assert made.name.endswith(f"-py3-none-{PLATFORM}.whl")
    inside = zipfile.ZipFile(made).namelist()
    assert f"rgexport/kernels/onnx/{library.LIBRARY.name}" in inside
    assert f"rgexport/kernels/rounding/{rounding.LIBRARY.name}" in inside
    assert "rgexport/page/page.zip" in inside or not shutil.which("npm")
    zipfile.ZipFile(made).extractall(tmp_path / "installed")
    code = (
        "from rgexport.kernels.onnx import library; print(library.LIBRARY, *library.kernels().ops)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    path, *ops = ran.stdout.split()
    assert path.startswith(str(tmp_path)) and tuple(ops) == library.kernels().ops


@pytest.mark.nightly  # compiles the kernels anew
def test_a_wheel_without_a_compiler_says_so(tmp_path):
    wheel(tmp_path, NO_COMPILER)
    (made,) = tmp_path.glob("*.whl")
    assert made.name.endswith("-py3-none-any.whl")
    inside = zipfile.ZipFile(made)
    assert not [name for name in inside.namelist() if name.endswith((".so", ".dylib", ".dll"))]
    for project in PROJECTS:
        why = inside.read(f"rgexport/kernels/{project.name}/{NOT_BUILT}").decode()
        assert NO_COMPILER in why


@pytest.mark.nightly  # compiles the kernels anew
@pytest.mark.skipif(os.name != "posix", reason="the broken compiler is a shell script")
def test_a_wheel_with_one_of_two_libraries_is_for_this_platform(tmp_path):
    """Tagged for any platform, it would be installed where that library cannot be loaded."""
    compiler = tmp_path / "broken-for-onnx"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *rgexport_onnx*) exit 1;; esac\n{COMPILER} "$@"\n'
    )
    compiler.chmod(0o755)
    wheel(tmp_path / "wheels", str(compiler))
    (made,) = (tmp_path / "wheels").glob("*.whl")
    assert made.name.endswith(f"-py3-none-{PLATFORM}.whl")
    inside = zipfile.ZipFile(made)
    (facts,) = (name for name in inside.namelist() if name.endswith(".dist-info/WHEEL"))
    assert b"Root-Is-Purelib: false" in inside.read(facts)
    assert inside.getinfo(f"rgexport/kernels/rounding/{rounding.LIBRARY.name}").file_size
    why = inside.read(f"rgexport/kernels/onnx/{NOT_BUILT}").decode()
    assert compiler.name in why and library.LIBRARY.name not in str(inside.namelist())
