"""The command line as a user runs it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

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
