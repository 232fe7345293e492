"""The libraries and programs that the tests of kernels compile.

Each function returns a folder, which `tests.built` keeps.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rgexport.kernels.build import build
from rgexport.kernels.onnx import library
from tests.built import COMPILER, built
from tests.command_line import ROOT

HERE = Path(__file__).parent
ORACLES = ROOT / "fuzz" / "ops"
SOURCES = library.FOLDER
INCLUDED = SOURCES / "src"
LIBRARY = [*sorted(INCLUDED.iterdir()), SOURCES / "CMakeLists.txt", SOURCES.parent / "build.py"]
DRIVERS = [*sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.h"))]
DRIVER = "quant_matmul_driver"

ORT_HEADERS = Path("/usr/include/onnxruntime")
"""Of Debian's libonnxruntime-dev."""
RUNTIMES = HERE / "several_runtimes.cpp", HERE.parent / "load_library.h"

ARM = "aarch64-linux-gnu"
ARM_COMPILER = f"{ARM}-g++"
ARM_SETS = "scalar", "neon", "i8mm"

VECTORS = (
    "-mfma",
    "-mf16c",
    "-mgfni",
    *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni", "bf16")),
)
TILES = "-mamx-tile", "-mamx-int8", "-mamx-bf16"
EMULATED = "-include", str(HERE / "amx_emulated.h")
SANITIZED = "-O1", "-g1", "-fno-sanitize-recover=all"
AMX: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "optimized": (("-O3",), EMULATED),
    "address": ((*SANITIZED, "-fsanitize=address"), EMULATED),
    "undefined": ((*SANITIZED, "-fsanitize=undefined"), EMULATED),
    "real": (("-O3",), TILES),
}
"""Flags for the AMX kernels and the driver, and those that give the tile instructions."""

needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}")


def native() -> Path:
    """The library by its own flags, with its objects, and the driver with their kernels."""
    return built(_native, [*LIBRARY, *DRIVERS], *library.kernels().instruction_sets)


def _native(folder: Path, *sets: str) -> None:
    objects = ROOT / "build" / "native" / "onnx"  # of `make native`
    build(SOURCES, folder, objects)
    for path in objects.rglob("*.o"):
        shutil.copy(path, folder)
    kernels = {name: folder / f"quant_matmul_{name}.cpp.o" for name in sets}
    _build_driver(COMPILER, folder, kernels)


def sanitized(sanitizer: str) -> Path:
    """The library and `sanitized_ops`. Two sanitizers at once would compile for minutes."""
    return built(_sanitized, [*LIBRARY, *DRIVERS], sanitizer)


def _sanitized(folder: Path, sanitizer: str) -> None:
    build(SOURCES, folder, folder / "build", f"-DSANITIZE={sanitizer}")
    flags = "-O1", "-g1", "-fno-sanitize-recover=all", "-pthread", f"-fsanitize={sanitizer}"
    _compile(COMPILER, *flags, HERE / "sanitized_ops.cpp", "-o", folder / "sanitized_ops", "-ldl")


def arm() -> Path:
    """The library for 64-bit Arm, the driver with its kernels, and `sanitized_ops`."""
    return built(_arm, [*LIBRARY, *DRIVERS], compiler=ARM_COMPILER)


def _arm(folder: Path) -> None:
    system = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"
    build(SOURCES, folder, folder / "build", *system, f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}")
    kernels = {name: next(folder.rglob(f"quant_matmul_{name}.cpp.o")) for name in ARM_SETS}
    _build_driver(ARM_COMPILER, folder, kernels, ("-O2", "-static"))
    program = "-o", folder / "sanitized_ops"
    _compile(ARM_COMPILER, "-O1", "-pthread", HERE / "sanitized_ops.cpp", *program, "-ldl")


def amx(kind: str) -> Path:
    """The driver with the kernels for AMX, in one of the ways of `AMX`, and for AVX-512."""
    return built(_amx, [*LIBRARY, *DRIVERS], kind)


def _amx(folder: Path, kind: str) -> None:
    flags, tiles = AMX[kind]
    each = {"avx512": ("-O2", *VECTORS), "amx": (*flags, *VECTORS, *tiles)}
    kernels = {name: folder / f"{name}.o" for name in each}
    for name, made in kernels.items():
        _compile(COMPILER, *each[name], "-c", INCLUDED / f"quant_matmul_{name}.cpp", "-o", made)
    _build_driver(COMPILER, folder, kernels, flags)


def judged() -> Path:
    """The folder with `judged_ops`."""
    return built(_judged, [*LIBRARY, *DRIVERS, *sorted(ORACLES.glob("*.[ch]*"))])


def _judged(folder: Path) -> None:
    flags = "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread", f"-I{ORACLES}", f"-I{HERE}"
    sources = HERE / "judged_ops.cpp", *sorted(ORACLES.glob("oracle_*.cpp"))
    _compile(COMPILER, *flags, *sources, "-o", folder / "judged_ops", "-ldl")


def fastest(sanitizer: str) -> Path:
    """The folder with `fastest`."""
    return built(_fastest, [*LIBRARY, *DRIVERS], sanitizer)


def _fastest(folder: Path, sanitizer: str) -> None:
    flags = "-Wall", "-Werror", "-O1", "-pthread", f"-fsanitize={sanitizer}"
    _compile(COMPILER, *flags, HERE / "fastest_driver.cpp", "-o", folder / "fastest")


def two_tables() -> Path:
    """The folder with `two_tables`."""
    return built(_two_tables, [*DRIVERS, INCLUDED / "ort_abi.h"])


def _two_tables(folder: Path) -> None:
    _compile(
        COMPILER, "-O1", "-pthread", HERE / "two_tables.cpp", "-o", folder / "two_tables", "-ldl"
    )


def several_runtimes() -> Path:
    """The folder with `several_runtimes`."""
    return built(_several_runtimes, RUNTIMES)


def _several_runtimes(folder: Path) -> None:
    compile_several_runtimes(COMPILER, folder / "several_runtimes", "-ldl")


def compile_several_runtimes(compiler: str, program: Path, *flags: str) -> None:
    """Compiles the program for the system that a compiler is for."""
    places = f"-I{HERE.parent}", "-isystem", str(ORT_HEADERS)
    _compile(compiler, "-Wall", "-Wextra", *places, RUNTIMES[0], "-o", program, *flags)


def _build_driver(
    compiler: str, folder: Path, kernels: Mapping[str, Path], flags: Sequence[str] = ("-O2",)
) -> None:
    """Links quant_matmul_driver.cpp with the object for each instruction set, such as "avx512"."""
    rows = " ".join(f"X({name})" for name in kernels)
    every = "-Wall", "-Wextra", f"-DEACH_SET(X)={rows}"
    sources = HERE / f"{DRIVER}.cpp", INCLUDED / "cpu.cpp"
    _compile(compiler, *every, *flags, *sources, *kernels.values(), "-o", folder / DRIVER)


def _compile(compiler: str, *arguments: str | Path) -> None:
    command = [compiler, "-std=c++17", f"-I{INCLUDED}", *arguments]
    subprocess.run(command, check=True)
