"""All ops under the address, undefined-behaviour and thread sanitizers, on every set here.

They run difficult inputs, and refuse those that a broken model file may contain.
"""

import os
import subprocess
from pathlib import Path

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),  # with the build, which takes minutes on a busy machine
    pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason),
]


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("undefined", "thread")]


@pytest.fixture(scope="module", params=["address", *NIGHTLY])
def program(request) -> tuple[Path, Path]:
    """The program, and the library for it."""
    folder = programs.sanitized(request.param)
    return folder / "sanitized_ops", folder / library.LIBRARY.name


def ran(program: tuple[Path, Path], instruction_set: str, *arguments: str) -> list[list[str]]:
    """The words of each line that the program prints; it must not fail."""
    # GCC's fake stack does not align what AVX-512 needs aligned (its bug 110027).
    more = {library.CPU: instruction_set, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    command = [*program, *arguments]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("instruction_set", library.kernels().instruction_sets)
def test_clean(program, instruction_set):
    found = {tuple(words[:2]) for words in ran(program, instruction_set)}
    assert found == {(instruction_set, op) for op in library.kernels().ops}


def test_what_no_op_may_run_ends_in_an_error(program):
    ((_, _, count),) = ran(program, library.kernels().instruction_set, "refusals")
    assert int(count) > 60
