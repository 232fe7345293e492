"""Caches what tests compile and export in `build/tests`, until what it is made from changes."""

import hashlib
import inspect
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from filelock import FileLock

from tests.command_line import ROOT

FOLDER = ROOT / "build" / "tests"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "c++"
_VARIABLES = "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"
"""Environment variables that CMake takes flags from."""


def built(
    make: Callable[..., None], sources: Iterable[Path], *arguments: str, compiler: str = COMPILER
) -> Path:
    """The folder that `make(folder, *arguments)` filled, now or in an earlier run.

    If two processes call it at once, one builds and the other waits.

    Args:
        make: compiles; a change of the file that defines it counts, too.
        sources: all files that are compiled or included.
        arguments: for `make`.
        compiler: the one that `make` calls.
    """
    name = "-".join([make.__name__.strip("_"), *arguments])
    flags = (os.environ.get(variable, "") for variable in _VARIABLES)
    digest = digest_of([Path(inspect.getfile(make)), *sources], _version(compiler), *flags)
    return filled(name, digest, lambda folder: make(folder, *arguments))


def filled(name: str, digest: str, fill: Callable[[Path], object]) -> Path:
    """Returns the folder that `fill(folder)` filled for this digest of what it depends on."""
    folder = FOLDER / f"{name}.{digest}"
    with one_at_a_time(name):
        if not folder.is_dir():
            for older in FOLDER.glob(f"{name}.*/"):
                shutil.rmtree(older)
            new = FOLDER / f"{name}.new"
            new.mkdir()
            fill(new)
            new.rename(folder)
    return folder


def one_at_a_time(name: str) -> FileLock:
    """A lock between test processes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FileLock(FOLDER / f"{name}.lock")


def digest_of(files: Iterable[Path], *words: str) -> str:
    """Returns a hash of the contents of files, and of words."""
    digest = hashlib.sha256(repr(words).encode())
    for path in files:
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
