"""Files that are on the disk, complete, when a call returns."""

import errno
import os
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]{8}")
_ABANDONED_SECONDS = 600
"""A partial file that was not written to for so long is what a killed process left."""
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
"""Errors of systems, and of folders that may not be read, that synchronize no folders."""


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file, or replaces it; if that fails, an earlier file is unchanged.

    Raises:
        OSError: the disk is full or fails, or the folder cannot be written to.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # a disk that fails may fail here, too
            partial.unlink()
        raise
    sync_folder(path.parent)


def remove_abandoned(entry: os.DirEntry[str]) -> None:
    """Removes a file that a killed process has left half-written; leaves all others."""
    with suppress(OSError):
        abandoned = time.time() - _ABANDONED_SECONDS
        if _PARTIAL.fullmatch(entry.name) and entry.stat().st_mtime < abandoned:
            os.unlink(entry.path)


def sync_folder(folder: Path) -> None:
    """Puts the entries of a folder on the disk, where the system can.

    Raises:
        OSError: the disk fails.
    """
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
