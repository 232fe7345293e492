"""How the tests choose their cases, and what they make of skips."""

import os
import subprocess
import sys
from itertools import combinations, product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.command_line import ROOT
from tests.pairs import covering_rows


@given(st.lists(st.integers(1, 7), min_size=3, max_size=6))
def test_few_rows_hold_every_pair_of_values(sizes):
    values = [[f"{name}" for name in range(size)] for size in sizes]
    rows = covering_rows(values)
    assert rows == covering_rows(values) and {*rows} <= {*product(*values)}
    for one, other in combinations(range(len(sizes)), 2):
        held = {(row[one], row[other]) for row in rows}
        assert held == {*product(values[one], values[other])}
    assert len({*rows}) == len(rows) <= 2 * prod(sorted(sizes)[-2:])


TESTS = """
import pytest

def test_that_needs_a_graphics_card():
    pytest.skip("no CUDA device")

@pytest.mark.parametrize("one", range(9))
@pytest.mark.parametrize("other", range(9))
@pytest.mark.parametrize("third", "ab")
def test_with_three_parameters(one, other, third):
    pass
"""


@pytest.mark.parametrize(("listed", "code"), [("no CUDA", 0), ("# no CUDA", 1)])
def test_of_three_parameters_pairs_run_and_only_listed_skips_pass(listed, code, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "skips.txt").write_text(f"{listed}\n")
    options = "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "--rootdir", "."
    command = [sys.executable, "-m", "pytest", *options, "--expected-skips=skips.txt", "test_it.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout
    assert ("does not list the reason: no CUDA device" in done.stdout) == bool(code)
    assert "81 deselected" in done.stdout


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells processors")
def test_torch_has_no_more_threads_than_its_process_has_processors():
    assert torch.get_num_threads() <= len(os.sched_getaffinity(0))
