"""A skip for a reason that is not on the list fails the run."""

import subprocess
import sys

import pytest

from tests.command_line import ROOT

TESTS = """
import pytest

def test_that_needs_a_graphics_card():
    pytest.skip("no CUDA device")

def test_passes():
    pass
"""


@pytest.mark.parametrize(("listed", "code"), [("no CUDA", 0), ("# no CUDA", 1), ("", 1)])
def test_only_listed_reasons_pass(listed, code, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "skips.txt").write_text(f"{listed}\n")
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\n"
        "from tests.skips import ExpectedSkips\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(ExpectedSkips(Path('skips.txt')))\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout
    assert ("does not list the reason: no CUDA device" in done.stdout) == bool(code)
