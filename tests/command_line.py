"""The command line as a user runs it: in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rgexport.cli import run

ROOT = Path(__file__).parents[1]
START = "from rgexport.cli import main; main()"


def rgexport(
    *arguments: str | Path,
    folder: Path,
    before: str = "",
    text: str = "",
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, with `text` as its input and `before` run ahead of it."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    program = [sys.executable, "-c", f"{before}\n{START}", *map(str, arguments)]
    return subprocess.run(
        program, cwd=folder, env=variables, input=text, capture_output=True, text=True, timeout=300
    )


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must be refused; returns the line."""
    before = tree(Path())
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    *progress, line = captured.err.splitlines()
    assert line.startswith("Error: ") and 20 < len(line) < 1000 and line.isprintable()
    assert not any("Error" in other or "Traceback" in other for other in progress)
    assert tree(Path()) == before
    return line


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def assert_matches(complaint: str, line: str) -> None:
    assert re.search(complaint, line), line
