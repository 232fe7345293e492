"""A disk that fails on demand: system calls for paths below one folder."""

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_WRITING = {"write", "replace", "unlink", "mkdir", "utime"}
_ERRORS: dict[str, tuple[int, set[str]]] = {
    "read-only": (errno.EROFS, _WRITING),
    "full": (errno.ENOSPC, {"data"}),
    "unlistable": (errno.EACCES, {"scandir", "listdir", "open"}),
    "unsynced": (errno.EIO, {"fsync"}),
    "unreadable": (errno.EIO, {"read", "stat"}),
    "stale": (errno.ESTALE, {*_WRITING, "read", "stat", "scandir", "listdir", "open", "fsync"}),
}
"""Fault → the error, and the operations that end in it."""
FAULTS = (*_ERRORS, "replaced", "removed")
_PATCHED = "replace unlink mkdir utime scandir listdir open stat".split()


class FaultyDisk:
    """A folder whose disk works until `begin` gives it a fault."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls = folder, 0
        self._fault, self._aside = "", folder.with_name(f"{folder.name}-aside")
        self._released = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for name in _PATCHED:
            patch.setattr(os, name, self._failing(name, getattr(os, name)))
        patch.setattr(os, "fsync", self._failing_sync(os.fsync))
        patch.setattr(io, "open", self._failing_open(io.open))

    def begin(self, fault: str) -> None:
        """Fails from now on; `hanging` lets whoever reads or synchronizes wait."""
        self._released.clear()
        if fault == "replaced":
            self.folder.rename(self._aside)
            self.folder.write_bytes(b"a file")
        elif fault == "removed":
            shutil.rmtree(self.folder)
        self._fault = fault

    def end(self) -> None:
        """Works again."""
        fault, self._fault = self._fault, ""
        self._released.set()
        if fault == "replaced":
            self.folder.unlink()
            self._aside.rename(self.folder)

    def _fail(self, operation: str, path: Any = None) -> None:
        """Raises the error of the current fault, where the operation has one."""
        if self._fault == "hanging" and operation in ("read", "fsync"):
            self.calls += 1
            self._released.wait()
        code, operations = _ERRORS.get(self._fault, (0, set()))
        if operation in operations and (path is None or self._is_below(path)):
            self.calls += 1
            raise OSError(code, os.strerror(code), path and str(path))

    def _is_below(self, path: Any) -> bool:
        return not isinstance(path, int) and str(path).startswith(f"{self.folder}")

    def _failing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Any, *arguments: Any, **options: Any) -> Any:
            self._fail(name, path)
            return call(path, *arguments, **options)

        return checked

    def _failing_sync(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def checked(descriptor: int) -> None:
            self._fail("fsync")
            call(descriptor)

        return checked

    def _failing_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not self._is_below(path):
                return call(path, mode, *arguments, **options)
            self._fail("write" if set(mode) & set("wax+") else "read", path)
            file = call(path, mode, *arguments, **options)
            return _FaultyFile(file, self._fail) if "w" in mode else file

        return checked


class _FaultyFile:
    """A file that is being written; a full disk takes the first bytes."""

    def __init__(self, file: Any, fail: Callable[[str], None]) -> None:
        self._file, self._fail, self._begun = file, fail, False

    def write(self, data: Any) -> int:
        if self._begun:
            self._fail("data")
        self._begun = True
        return int(self._file.write(data))

    def writelines(self, chunks: Any) -> None:
        for chunk in chunks:
            self.write(chunk)

    def __enter__(self) -> "_FaultyFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
