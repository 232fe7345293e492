"""The fuzzer's oracles accept the library's answers, and reject wrong ones."""

import os
import subprocess

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs
from tests.kernels.onnx.programs import needs_compiler

pytestmark = [
    pytest.mark.full,
    needs_compiler,
    pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason),
]


@pytest.mark.parametrize("instruction_set", library.kernels().instruction_sets)
def test_right_and_wrong_answers(instruction_set):
    environment = os.environ | {library.CPU: instruction_set}
    command = [programs.judged() / "judged_ops", library.LIBRARY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    judged = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert judged == {(instruction_set, op) for op in library.kernels().ops}
