"""The libraries and programs that the tests of kernels compile, and how they are run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from rgexport.kernels.build import build
from rgexport.kernels.onnx import library
from tests.built import COMPILER, built, one_at_a_time
from tests.command_line import ROOT

HERE = Path(__file__).parent
ORACLES = ROOT / "fuzz" / "ops"
SOURCES = library.FOLDER
INCLUDED = SOURCES / "src"
LIBRARY = [*sorted(INCLUDED.iterdir()), SOURCES / "CMakeLists.txt", SOURCES.parent / "build.py"]
DRIVERS = [*sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.h")), HERE.parent / "load_library.h"]
DRIVER = "quant_matmul_driver"
ORT_HEADERS = Path("/usr/include/onnxruntime")  # of Debian's libonnxruntime-dev
ARM = "aarch64-linux-gnu"
ARM_COMPILER = f"{ARM}-g++"
VECTORS = (
    *("-mfma", "-mf16c", "-mgfni"),
    *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni", "bf16")),
)
EMULATED = "-include", str(HERE / "amx_emulated.h")
SANITIZED = "-O1", "-g1", "-fno-sanitize-recover=all"
AMX: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "emulated": (("-O1",), EMULATED),
    "address": ((*SANITIZED, "-fsanitize=address"), EMULATED),
    "undefined": ((*SANITIZED, "-fsanitize=undefined"), EMULATED),
    "real": (("-O3",), ("-mamx-tile", "-mamx-int8", "-mamx-bf16")),
}
"""Flags for the AMX kernels and the driver, and those that give the tile instructions."""

# GCC's fake stack does not align what AVX-512 needs aligned (its bug 110027).
NO_FAKE_STACK = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}")


def nightly(*names: str) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.nightly) for name in names]


def output(command: Sequence[object], **environment: str) -> list[str]:
    """Returns the lines that a program prints; it must not fail."""
    variables = os.environ | environment
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=variables, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stderr == ""
    return done.stdout.splitlines()


def require_products(*command: object, **environment: str) -> None:
    """Requires every product to be as close to its definition as float32 allows."""
    assert output(command, **environment)[-1].endswith(" products, 0 wrong")


def kept(*sources: Path, compiler: str = COMPILER) -> Callable[..., Callable[..., Path]]:
    """Makes a function that fills a folder return the folder, filled now or in an earlier run."""

    def decorate(make: Callable[..., None]) -> Callable[..., Path]:
        files = [*LIBRARY, *DRIVERS, *sources]
        return lambda *arguments: built(make, files, *arguments, compiler=compiler)

    return decorate


@kept()
def native(folder: Path, *sets: str) -> None:
    """The library by its own flags, with its objects, and the driver with the kernels of sets."""
    objects = ROOT / "build" / "native" / "onnx"  # of `make native`
    build(SOURCES, folder, objects)
    for path in objects.rglob("*.o"):
        shutil.copy(path, folder)
    _build_driver(COMPILER, folder, {name: folder / f"quant_matmul_{name}.cpp.o" for name in sets})


@kept()
def sanitized(folder: Path, sanitizer: str, *left_out: str) -> None:
    """The library, without products on the sets that are left out, and `sanitized_ops`."""
    src = shutil.copytree(SOURCES, folder / "sources") / "src"
    for name in left_out:
        body = f"namespace rgexport {{ QuantKernels quant_kernels_{name}() {{ return {{}}; }} }}"
        (src / f"quant_matmul_{name}.cpp").write_text(f'#include "quant_matmul.h"\n{body}\n')
    build(src.parent, folder, folder / "build", f"-DSANITIZE={sanitizer}")
    _compile(COMPILER, folder, "sanitized_ops", *SANITIZED, f"-fsanitize={sanitizer}", "-ldl")


@kept(compiler=ARM_COMPILER)
def arm(folder: Path) -> None:
    """The library for 64-bit Arm, the driver with its kernels, and `sanitized_ops`."""
    system = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"
    build(SOURCES, folder, folder / "build", *system, f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}")
    sets = "scalar", "neon", "i8mm"
    kernels = {name: next(folder.rglob(f"quant_matmul_{name}.cpp.o")) for name in sets}
    _build_driver(ARM_COMPILER, folder, kernels, ("-O2", "-static"))
    _compile(ARM_COMPILER, folder, "sanitized_ops", "-O1", "-ldl")


@kept()
def amx(folder: Path, kind: str) -> None:
    """The driver with the kernels for AMX, in one of the ways of `AMX`."""
    flags, tiles = AMX[kind]
    kernels = folder / "amx.o"
    source = INCLUDED / "quant_matmul_amx.cpp"
    options = "-std=c++17", f"-I{INCLUDED}", *flags, *VECTORS, *tiles
    subprocess.run([COMPILER, *options, "-c", source, "-o", kernels], check=True)
    _build_driver(COMPILER, folder, {"amx": kernels}, flags)


@kept(*sorted(ORACLES.glob("*.[ch]*")))
def judged(folder: Path) -> None:
    flags = "-O2", "-ffp-contract=off", f"-I{ORACLES}", f"-I{HERE}"
    _compile(COMPILER, folder, "judged_ops", *flags, *ORACLES.glob("oracle_*.cpp"), "-ldl")


@kept()
def fastest(folder: Path, sanitizer: str) -> None:
    _compile(COMPILER, folder, "fastest_driver", "-Werror", "-O1", f"-fsanitize={sanitizer}")


@kept()
def processors(folder: Path) -> None:
    _compile(COMPILER, folder, "processors", "-O1", INCLUDED / "ranges.cpp")


@kept()
def two_tables(folder: Path) -> None:
    _compile(COMPILER, folder, "two_tables", "-O1", "-ldl")


def runtime(version: str, platform: str = "") -> Path:
    """The folder of a release of ONNX Runtime, which pip fills if it is not there."""
    folder = ROOT / "out" / f"ort-{version}{platform}"
    options = ["--platform", platform, "--only-binary=:all:"] if platform else []
    new = folder.with_name(f"{folder.name}.{os.getpid()}")
    asked = ["install", "-q", "--no-deps", "--target", new, *options, f"onnxruntime=={version}"]
    with one_at_a_time(folder.name):
        if not (folder / "onnxruntime").is_dir():
            command = [sys.executable, "-m", "pip", *asked]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(new, ignore_errors=True)
                pytest.skip(f"{asked[-1]} cannot be fetched: {done.stderr.strip()[-200:]}")
            new.rename(folder)
    return folder


def compile_several_runtimes(compiler: str, folder: Path, *flags: str) -> None:
    places = f"-I{HERE.parent}", "-isystem", str(ORT_HEADERS)
    _compile(compiler, folder, "several_runtimes", *places, *flags)


def _build_driver(
    compiler: str, folder: Path, kernels: Mapping[str, Path], flags: Sequence[str] = ("-O2",)
) -> None:
    """Links quant_matmul_driver.cpp with the object for each instruction set, such as "avx512"."""
    rows = " ".join(f"X({name})" for name in kernels)
    objects = INCLUDED / "cpu.cpp", *kernels.values()
    _compile(compiler, folder, DRIVER, f"-DEACH_SET(X)={rows}", *flags, *objects)


def _compile(compiler: str, folder: Path, program: str, *more: str | Path) -> None:
    """Compiles the source `program`; libraries come last, after the objects that need them."""
    flags = "-std=c++17", "-Wall", "-Wextra", "-pthread", f"-I{INCLUDED}"
    command = [compiler, *flags, HERE / f"{program}.cpp", *more, "-o", folder / program]
    subprocess.run(command, check=True)
