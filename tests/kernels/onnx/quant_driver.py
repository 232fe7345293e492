"""Builds quant_matmul_driver.cpp: it holds quantized matmul kernels against what they mean."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rgexport.kernels.onnx.build import SOURCES

_SOURCE = Path(__file__).with_name("quant_matmul_driver.cpp")


def build_driver(
    compiler: str, folder: Path, kernels: Mapping[str, Path], flags: Sequence[str] = ("-O2",)
) -> Path:
    """Links the driver with some kernels.

    Args:
        compiler: for the machine that the objects are for.
        folder: for the program.
        kernels: the object for each instruction set, such as "avx512".
        flags: more of them for the compiler.
    """
    driver = folder / "quant_matmul_driver"
    rows = " ".join(f"X({name})" for name in kernels)
    every = "-std=c++17", "-Wall", "-Wextra", f"-I{SOURCES / 'src'}", f"-DEACH_SET(X)={rows}"
    sources = _SOURCE, SOURCES / "src" / "cpu.cpp"
    command = [compiler, *every, *flags, *sources, *kernels.values(), "-o", driver]
    subprocess.run(command, check=True)
    return driver


def assert_products_right(command: Sequence[str | Path], **environment: str) -> None:
    """Runs the driver; every product must be as close to its definition as float32 allows."""
    found = os.environ | environment
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=found)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith(" products, 0 wrong\n") and done.stderr == ""
