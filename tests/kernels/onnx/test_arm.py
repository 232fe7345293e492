"""The library for 64-bit Arm: cross-compiled, and run by QEMU's user mode."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from rgexport.kernels.onnx.build import SOURCES, build
from tests.kernels.onnx.quant_driver import assert_products_right, build_driver

TARGET = "aarch64-linux-gnu"
COMPILER = f"{TARGET}-g++"
EMULATOR = "qemu-aarch64"
SETS = "scalar", "neon", "i8mm"
MISSING = [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]
# What processors are, and the best that the library has for them.
PROCESSORS = {"cortex-a72": "scalar", "neoverse-n1": "neon", "max": "i8mm"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    """A folder with the library, in it `build` with the objects."""
    folder = tmp_path_factory.mktemp("arm")
    system = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"
    build(folder, folder / "build", *system, f"-DCMAKE_CXX_COMPILER={COMPILER}")
    return folder


def test_products(arm):
    kernels = {name: next(arm.rglob(f"quant_matmul_{name}.cpp.o")) for name in SETS}
    driver = build_driver(COMPILER, arm, kernels, ("-O2", "-static"))
    assert_products_right([EMULATOR, "-cpu", "max", driver])


@pytest.mark.parametrize(("processor", "best"), PROCESSORS.items())
def test_whole_library(arm, processor, best):
    """All ops, on a processor that has no more than `best`: one instruction too many ends it."""
    program, source = arm / "sanitized_ops", Path(__file__).with_name("sanitized_ops.cpp")
    if not program.exists():
        flags = "-std=c++17", "-O1", f"-I{SOURCES / 'src'}", "-pthread"
        subprocess.run([COMPILER, *flags, source, "-o", program, "-ldl"], check=True)
    emulator = EMULATOR, "-L", f"/usr/{TARGET}", "-cpu", processor
    found = {name: value for name, value in os.environ.items() if name != library.CPU}
    done = subprocess.run(
        [*emulator, program, next(arm.glob("librgexport_onnx.*"))],
        env=found,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {best}
