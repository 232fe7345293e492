"""Windows' rules for files, on Linux: what is open cannot be removed, replaced or renamed.

Only files that this process has open or mapped count, as the system lists them.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from rgexport.files import atomic, targets
from rgexport.files.paths import windows_objection

_FDS, _MAPS = Path("/proc/self/fd"), Path("/proc/self/maps")


def apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the functions of `os` that change folders refuse what Windows refuses."""
    if not _MAPS.is_file():
        pytest.skip("only Linux lists what a process has open")
    monkeypatch.setattr(atomic, "WINDOWS", True)
    monkeypatch.setattr(targets, "WINDOWS", True)
    monkeypatch.setattr(atomic, "_PAUSES", (0.001,))
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    monkeypatch.setattr(filelock.FileLock, "_release", _removing(filelock.FileLock._release))
    for name in ("unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, _removal(getattr(os, name)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, _rename(os.replace, replaces=name == "replace"))


def _open_or_mapped() -> Iterator[str]:
    for entry in list(_FDS.iterdir()):
        try:
            yield os.readlink(entry)
        except OSError:
            continue  # the list itself
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        if (at := line.find("/")) >= 0:
            yield line[at:]


def _require_closed(path: Any) -> None:
    real = os.path.realpath(path)
    if any(name == real or name.startswith(f"{real}/") for name in _open_or_mapped()):
        raise PermissionError(errno.EACCES, "The process cannot access the file", os.fspath(path))


def _require_writable(path: Any) -> None:
    if os.path.isfile(path) and not os.stat(path).st_mode & stat.S_IWUSR:
        raise PermissionError(errno.EACCES, "Access is denied", os.fspath(path))


def _removal(real: Callable[..., None]) -> Callable[..., None]:
    def remove(path: Any) -> None:
        _require_closed(path)
        _require_writable(path)
        real(path)

    return remove


def _rename(real: Callable[..., None], *, replaces: bool) -> Callable[..., None]:
    def rename(source: Any, target: Any) -> None:
        if objection := windows_objection(os.path.basename(os.fspath(target))):
            raise OSError(errno.EINVAL, objection, os.fspath(target))
        if os.path.lexists(target) and (not replaces or os.path.isdir(target)):
            raise FileExistsError(errno.EEXIST, "Cannot create a file", os.fspath(target))
        for path in (source, target):
            _require_closed(path)
        _require_writable(target)
        real(source, target)

    return rename


def _removing(release: Callable[[Any], None]) -> Callable[[Any], None]:
    def release_and_remove(lock: Any) -> None:
        """On Windows, filelock removes the file when it is closed."""
        release(lock)
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)

    return release_and_remove
