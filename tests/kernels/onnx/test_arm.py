"""The library for 64-bit Arm: cross-compiled, and run by QEMU's user mode."""

import os
import shutil
import subprocess

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs
from tests.kernels.onnx.quant_driver import assert_products_right

EMULATOR = "qemu-aarch64"
MISSING = [tool for tool in (programs.ARM_COMPILER, EMULATOR) if not shutil.which(tool)]
# What processors are, and the best that the library has for them.
PROCESSORS = {"cortex-a72": "scalar", "neoverse-n1": "neon", "max": "i8mm"}

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}"),
]


def test_products():
    assert_products_right([EMULATOR, "-cpu", "max", programs.arm() / programs.DRIVER])


@pytest.mark.parametrize(("processor", "best"), PROCESSORS.items())
def test_whole_library(processor, best):
    """All ops, on a processor that has no more than `best`: one instruction too many ends it."""
    folder = programs.arm()
    emulator = EMULATOR, "-L", f"/usr/{programs.ARM}", "-cpu", processor
    found = {name: value for name, value in os.environ.items() if name != library.CPU}
    done = subprocess.run(
        [*emulator, folder / "sanitized_ops", folder / library.LIBRARY.name],
        env=found,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {best}
