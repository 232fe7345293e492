"""The command line, in this process or in one of its own."""

import contextlib
import io
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
    """Runs a command in `folder`, with `text` as its input.

    It runs in this process, unless code runs `before` it or the environment differs.
    """
    words = [str(argument) for argument in arguments]
    if not before and environment is None:
        return _in_this_process(words, folder, text)
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    program = [sys.executable, "-c", f"{before}\n{START}", *words]
    return subprocess.run(
        program, cwd=folder, env=variables, input=text, capture_output=True, text=True, timeout=300
    )


def _in_this_process(words: list[str], folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    output, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", io.StringIO(text))
        code = run(words)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


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
