"""Files and folders that appear complete or not at all.

Imports the standard library alone: the build hook uses it before anything is installed.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rgexport.progress import warn

WINDOWS = os.name == "nt"
_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]{8}")
_ABANDONED_SECONDS = 600
_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}
"""Errors of systems that synchronize no folders, and of folders that may not be read."""
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_PAUSES = 0.05, 0.1, 0.2, 0.4, 0.4
"""Seconds between attempts to rename or remove a file that another program has open."""
_LARGE_BYTES = 64 << 20


class TargetInUse(PermissionError):
    """A program has the target open, and the system does not replace open files."""


@contextmanager
def replacing(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a path beside `target`; the file or folder written there replaces `target`.

    Any exception removes it and leaves `target` unchanged. A killed process leaves a hidden
    `.NAME.partial-…`, see `remove_partials`. With `durable`, a file is on the disk at the end.
    Raises TargetInUse, or OSError where the disk is full or the folder read-only.
    """
    new = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        yield new
        if durable:
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        move(new, target)
        if durable:
            sync_folder(target.parent)
    finally:
        remove(new)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes or replaces a file in one step; it is on the disk when the function returns."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with replacing(path, durable=True) as new, new.open("wb") as file:
        file.writelines(chunks)


def remove_partials(target: Path) -> None:
    """Removes partial files and folders of `target`; only for its single writer."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}(-old)?")
    for entry in target.parent.iterdir():
        if pattern.fullmatch(entry.name):
            remove(entry)


def remove_abandoned(entry: os.DirEntry[str]) -> None:
    """Removes a partial file, of any target, that nobody has written to for ten minutes."""
    with suppress(OSError):
        abandoned = time.time() - _ABANDONED_SECONDS
        if _PARTIAL.fullmatch(entry.name) and entry.stat().st_mtime < abandoned:
            os.unlink(entry.path)


def sync_folder(folder: Path) -> None:
    """Puts the entries of a folder on the disk, where the system can."""
    if WINDOWS:
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


def evict_from_page_cache(path: Path) -> None:
    """Drops a large file from Linux's memory, to be cached in huge pages when read again."""
    if path.stat().st_size < _LARGE_BYTES or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), open(path, "rb+") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(entry: Path) -> None:
    """Removes a file or a folder if it exists, read-only or not; warns where it cannot."""
    with suppress(OSError):
        if entry.is_dir():
            for folder, _, _ in os.walk(entry):
                os.chmod(folder, 0o700)  # nothing in a read-only folder can be removed
            shutil.rmtree(entry, onerror=_remove_read_only)
        else:
            _retry(partial(entry.unlink, missing_ok=True))
    if os.path.lexists(entry):
        warn(f"{entry} cannot be removed; remove it yourself")


def _remove_read_only(remove: Callable[[str], object], path: str, error: object) -> None:
    """Removes a file that `shutil.rmtree` could not: Windows keeps read-only and open files."""
    with suppress(OSError):
        if remove in (os.unlink, os.rmdir):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
            _retry(partial(remove, path))


def move(new: Path, target: Path) -> None:
    """Renames `new` to `target`; `new` may then be an old folder, which the caller removes."""
    try:
        if not target.is_dir():  # a rename replaces a file in one step
            rename(new, target)
        elif not _exchange(new, target):
            old = new.with_name(f"{new.name}-old")
            rename(target, old)
            try:
                rename(new, target)
            except OSError:
                rename(old, target)
                raise
            remove(old)
    except PermissionError as error:
        raise TargetInUse(error.errno, error.strerror, str(target)) from error


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder; replaces an existing file, even a read-only one."""
    try:
        _retry(partial(os.replace, source, target))
    except PermissionError:
        if not WINDOWS or not target.is_file() or target.stat().st_mode & stat.S_IWUSR:
            raise
        target.chmod(0o600)  # Windows replaces no read-only file
        os.replace(source, target)


def _retry(change: Callable[[], object]) -> None:
    """Changes a folder; on Windows, tries again for a second, as scanners open new files there."""
    for seconds in _PAUSES if WINDOWS else ():
        try:
            change()
            return
        except PermissionError:
            time.sleep(seconds)
    change()


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; returns False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first), os.fsencode(second)
    return renameat2 is not None and not renameat2(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
    )
