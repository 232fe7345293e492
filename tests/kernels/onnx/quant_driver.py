"""Runs quant_matmul_driver.cpp: it holds quantized matmul kernels against what they mean."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def assert_products_right(command: Sequence[str | Path], **environment: str) -> None:
    """Every product must be as close to its definition as float32 allows."""
    found = os.environ | environment
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=found)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith(" products, 0 wrong\n") and done.stderr == ""
