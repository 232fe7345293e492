"""The kernels for AMX: with its tile instructions emulated, and on processors that have them."""

from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs

SETS = library.kernels().instruction_sets
CPU = Path("/proc/cpuinfo").read_text().split() if "avx512" in SETS else []
KINDS = "emulated", pytest.param("real", marks=pytest.mark.full)


@programs.needs_compiler
@pytest.mark.timeout(1800)  # with the build
@pytest.mark.skipif(not {"avx512_bf16", "gfni"} <= set(CPU), reason="no AVX-512 with bfloat16 here")
@pytest.mark.parametrize("kind", [*KINDS, *programs.nightly("address", "undefined")])
def test_products_of_amx(kind):
    """Emulated tiles are slow: only every third product."""
    if kind == "real" and "amx" not in SETS:
        pytest.skip(f"no AMX here: {SETS}")
    driver = programs.amx(kind) / programs.DRIVER
    programs.require_products(driver, "1" if kind == "real" else "3", **programs.NO_FAKE_STACK)
