"""Node and the packages that tests of browsers need."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.built import one_at_a_time

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "rgexport" / "npm"
_QUIET = "--no-audit", "--no-fund", "--no-package-lock"
_NO_NETWORK = re.compile(r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT)\b")


def node_with_packages() -> str:
    """Node, with the packages beside this file installed; or the test is skipped."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if not program or not npm:
        pytest.skip("Node and npm are not installed")
    with one_at_a_time("npm"):
        wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
        if not all((HERE / "node_modules" / name).exists() for name in wanted):
            # Scripts download libraries for graphics cards.
            _run([npm, "install", "--ignore-scripts", *_QUIET])
    return program


def install_our_package(folder: Path) -> None:
    """Installs `rgexport-web` from the file that `npm pack` makes in `folder`."""
    npm = shutil.which("npm")
    assert npm
    with one_at_a_time("npm"):
        made = _run([npm, "pack", str(PACKAGE), "--json", f"--pack-destination={folder}"])
        file = folder / json.loads(made)[0]["filename"]
        _run([npm, "install", "--no-save", "--ignore-scripts", "--prefer-offline", *_QUIET, file])


def node_result(*words: str | Path, timeout: float = 300) -> Any:
    """What a program prints last in Node, beside this file; it must not fail."""
    command = ["node", *map(str, words)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    if done.returncode and _NO_NETWORK.search(done.stderr):
        pytest.skip(f"npm has no network: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    return done.stdout
