"""The AMX kernels; on machines without AMX, too: only their tile instructions are emulated there.

Everything else in them is AVX-512, which the machine must have.
"""

from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs
from tests.kernels.onnx.programs import needs_compiler
from tests.kernels.onnx.quant_driver import assert_products_right

# GCC's fake stack does not align what AVX-512 needs aligned (its bug 110027).
NO_FAKE_STACK = "detect_stack_use_after_return=0"
HERE = library.kernels().instruction_sets
_CPUINFO = Path("/proc/cpuinfo")
CPU = _CPUINFO.read_text() if _CPUINFO.exists() else ""

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),  # with a build, and all products, in emulated instructions
    needs_compiler,
    pytest.mark.skipif("avx512" not in HERE, reason=f"no AVX-512 with VNNI here: {HERE}"),
    pytest.mark.skipif(
        not {"avx512_bf16", "gfni"} <= set(CPU.split()), reason="no bfloat16 or no GFNI here"
    ),
]


SANITIZED = [pytest.param(kind, 3, marks=pytest.mark.nightly) for kind in ("address", "undefined")]


@pytest.mark.parametrize(("kind", "every"), [("optimized", 1), *SANITIZED])
def test_emulated(kind, every):
    """All products, or every third one, since sanitizers make the emulation slow."""
    driver = programs.amx(kind) / programs.DRIVER
    assert_products_right([driver, str(every)], ASAN_OPTIONS=NO_FAKE_STACK)


@pytest.mark.skipif("amx" not in HERE, reason=f"no AMX here: {HERE}")
def test_real():
    assert_products_right([programs.amx("real") / programs.DRIVER])
