"""All ops under the address, undefined-behaviour and thread sanitizers, on every set here."""

import os
import subprocess
from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from rgexport.kernels.onnx.build import SOURCES, build
from tests.kernels.onnx.compiler import COMPILER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason),
]
FLAGS = "-std=c++17", "-O1", "-g1", "-fno-sanitize-recover=all", "-pthread"
HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["address", "undefined", "thread"])
def program(request, tmp_path_factory) -> tuple[Path, Path]:
    """The program, and the library for it. Two sanitizers at once would compile for minutes."""
    folder = tmp_path_factory.mktemp(request.param)
    sanitized = build(folder, folder / "build", f"-DSANITIZE={request.param}")
    made, source = folder / "sanitized_ops", HERE / "sanitized_ops.cpp"
    flags = *FLAGS, f"-fsanitize={request.param}", f"-I{SOURCES / 'src'}"
    subprocess.run([COMPILER, *flags, source, "-o", made, "-ldl"], check=True)
    return made, sanitized


@pytest.mark.parametrize("instruction_set", library.kernels().instruction_sets)
def test_clean(program, instruction_set):
    # GCC's fake stack does not align what AVX-512 needs aligned (its bug 110027).
    more = {library.CPU: instruction_set, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run(program, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stderr == ""
    ran = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert ran == {(instruction_set, op) for op in library.kernels().ops}
