"""The AMX kernels; on machines without AMX, too: only their tile instructions are emulated there.

Everything else in them is AVX-512, which the machine must have.
"""

import subprocess
from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from rgexport.kernels.onnx.build import SOURCES
from tests.kernels.onnx.compiler import COMPILER, needs_compiler
from tests.kernels.onnx.quant_driver import assert_products_right, build_driver

EMULATION = "-include", str(Path(__file__).with_name("amx_emulated.h"))
TILES = "-mamx-tile", "-mamx-int8", "-mamx-bf16"
VECTORS = "-mfma", "-mgfni", *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni", "bf16"))
SANITIZED = "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
# GCC's fake stack does not align what AVX-512 needs aligned (its bug 110027).
NO_FAKE_STACK = "detect_stack_use_after_return=0"
HERE = library.kernels().instruction_sets
_CPUINFO = Path("/proc/cpuinfo")
CPU = _CPUINFO.read_text() if _CPUINFO.exists() else ""

pytestmark = [
    pytest.mark.slow,
    needs_compiler,
    pytest.mark.skipif("avx512" not in HERE, reason=f"no AVX-512 with VNNI here: {HERE}"),
    pytest.mark.skipif(
        not {"avx512_bf16", "gfni"} <= set(CPU.split()), reason="no bfloat16 or no GFNI here"
    ),
]


def driver(folder: Path, flags: tuple[str, ...], tiles: tuple[str, ...]) -> Path:
    kernels = {name: folder / f"{name}.o" for name in ("avx512", "amx")}
    for name, made in kernels.items():
        source = SOURCES / "src" / f"quant_matmul_{name}.cpp"
        more = *flags, *VECTORS, *(tiles if name == "amx" else ())
        subprocess.run([COMPILER, "-std=c++17", *more, "-c", source, "-o", made], check=True)
    return build_driver(COMPILER, folder, kernels, flags)


@pytest.mark.parametrize("flags", [("-O3",), SANITIZED], ids=["optimized", "sanitized"])
def test_emulated(tmp_path, flags):
    assert_products_right([driver(tmp_path, flags, EMULATION)], ASAN_OPTIONS=NO_FAKE_STACK)


@pytest.mark.skipif("amx" not in HERE, reason=f"no AMX here: {HERE}")
def test_real(tmp_path):
    assert_products_right([driver(tmp_path, ("-O3",), TILES)])
