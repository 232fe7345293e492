"""The oracles of the fuzzer agree with the library, and with no answer that is wrong."""

import os
import subprocess
from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from rgexport.kernels.onnx.build import SOURCES
from tests.command_line import ROOT
from tests.kernels.onnx.compiler import COMPILER, needs_compiler

pytestmark = [
    pytest.mark.slow,
    needs_compiler,
    pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason),
]
HERE = Path(__file__).parent
ORACLES = ROOT / "fuzz" / "ops"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("judged") / "judged_ops"
    flags = "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"
    folders = (f"-I{folder}" for folder in (SOURCES / "src", ORACLES, HERE))
    sources = HERE / "judged_ops.cpp", *sorted(ORACLES.glob("oracle_*.cpp"))
    subprocess.run([COMPILER, *flags, *folders, *sources, "-o", made, "-ldl"], check=True)
    return made


@pytest.mark.parametrize("instruction_set", library.kernels().instruction_sets)
def test_right_and_wrong_answers(program, instruction_set):
    environment = os.environ | {library.CPU: instruction_set}
    command = [program, library.LIBRARY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    judged = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert judged == {(instruction_set, op) for op in library.kernels().ops}
