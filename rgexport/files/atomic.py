"""Folders and files that appear complete or not at all.

`renameat2` keeps that promise where a folder is replaced: with two renames there would be a moment
without one (`tests/files/test_atomic.py`).
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from rgexport.errors import RequestError
from rgexport.progress import amount, warn

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


@contextmanager
def replace_folder(
    target: Path, *, force: bool, replaceable: Callable[[Path], bool]
) -> Iterator[Path]:
    """Gives a temporary folder beside `target` that becomes `target` when the block ends well.

    Any exception removes it. A process that is killed leaves a folder `.NAME.partial-…` behind,
    which the next run with the same target removes. A kernel lock, released even by a kill,
    keeps two runs from writing one target.

    Args:
        target: the folder to make; its parent must exist.
        force: whether an existing target may be replaced.
        replaceable: says whether an existing folder is of a kind that `force` may replace;
            an empty one always is.

    Raises:
        RequestError: the target exists and may not be replaced, is in use as a folder to stand
            in or as a mount point, its parent is missing or not writable, another run is writing
            it, or the disk is full.
    """
    check = partial(check_target, target, force=force, replaceable=replaceable)
    with _replaced(target, check) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def replace_file(
    target: Path, *, force: bool, replaceable: Callable[[Path], bool]
) -> Iterator[Path]:
    """As `replace_folder`, for a file that the block writes and has on the disk when it ends."""
    check = partial(check_file_target, target, force=force, replaceable=replaceable)
    with _replaced(target, check) as file:
        yield file


@contextmanager
def _replaced(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    real = _check_place(target)
    with _one_line(target), _locked(target, real):
        _remove_stale(real)
        check()
        new = real.with_name(f".{real.name}.partial-{secrets.token_hex(4)}")
        try:
            yield new
            check()
            _move(new, real)
        finally:
            _remove(new)


def check_target(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Refuses a target that `replace_folder` would refuse, before any work is done.

    Raises:
        RequestError: see `replace_folder`.
    """
    real = _check_place(target)
    if not os.path.lexists(real):
        return
    if not target.is_dir():
        raise RequestError(f"{target} exists and is a file; pass another -o")
    may_replace = not any(target.iterdir()) or replaceable(target)
    _require_leave(target, may_replace, force, "holds")


def check_file_target(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Refuses a target that `replace_file` would refuse, before any work is done.

    Raises:
        RequestError: it is a folder, or a file that may not be replaced; see `replace_folder`.
    """
    real = _check_place(target)
    if not os.path.lexists(real):
        return
    if target.is_dir():
        raise RequestError(f"{target} exists and is a folder; pass a file with -o")
    _require_leave(target, replaceable(target), force, "is")


def _require_leave(target: Path, may_replace: bool, force: bool, verb: str) -> None:
    if not may_replace:
        raise RequestError(
            f"{target} exists and {verb} something else than what would be written there; "
            "pass another -o"
        )
    if not force:
        raise RequestError(f"{target} exists; pass --force to replace it, or another -o")


def _check_place(target: Path) -> Path:
    """Refuses a place where no folder can appear, whatever is there; gives its real path."""
    real = Path(os.path.realpath(target))
    if Path.cwd().is_relative_to(real):
        raise RequestError(
            f"cannot write {target}: it is the current folder or holds it; pass another -o"
        )
    if os.path.ismount(real):
        raise RequestError(f"cannot write {target}: it is a mount point; pass a folder in it")
    if not real.parent.is_dir():
        raise RequestError(
            f"cannot write {target}: there is no folder {real.parent}; make it first"
        )
    return real


def require_free_disk(folder: Path, needed_bytes: int) -> None:
    """Refuses to begin what would not fit on the disk that holds `folder`.

    Raises:
        RequestError: fewer than `needed_bytes` are free.
    """
    there = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise RequestError(
            f"not enough space for {folder}: {amount(needed_bytes)} needed, "
            f"{amount(free)} free; free some or choose another disk"
        )


@contextmanager
def _one_line(target: Path) -> Iterator[None]:
    """Tells what the system refused, where it is about the target, as a RequestError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise RequestError(
                f"no space left while writing {target}; free some or choose another disk"
            ) from error
        if error.filename and _is_about(os.path.realpath(os.fsdecode(error.filename)), target):
            raise RequestError(f"cannot write {target}: {error.strerror}") from error
        raise


def _is_about(path: str, target: Path) -> bool:
    real = Path(os.path.realpath(target))
    return path.startswith((str(real), str(real.with_name(f".{real.name}."))))


@contextmanager
def _locked(target: Path, real: Path) -> Iterator[None]:
    path = real.with_name(f".{real.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(
            f"another run is writing {target}; wait for it, or pass another -o"
        ) from None
    try:
        yield
    finally:
        # Removed while held: whoever opened it meanwhile sees that it has no name any more.
        path.unlink(missing_ok=True)
        lock.release()


def _remove_stale(target: Path) -> None:
    """Removes what killed runs left beside `target`; only for the holder of its lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}(-old)?")
    for entry in target.parent.iterdir():
        if pattern.fullmatch(entry.name):
            _remove(entry)


def _remove(entry: Path) -> None:
    """Removes a file, or a folder, read-only or not; warns where it cannot."""
    if not entry.is_dir():
        with suppress(OSError):
            entry.unlink(missing_ok=True)
    else:
        _remove_folder(entry)
    if os.path.lexists(entry):
        warn(f"{entry} cannot be removed; remove it yourself")


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for path, _, _ in os.walk(folder):  # what is left: removing takes leave to write in a folder
        with suppress(OSError):
            os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _move(new: Path, target: Path) -> None:
    """Renames; if the target is a folder, `new` holds the old one afterwards or is gone."""
    if not target.is_dir():  # a rename replaces a file in one step
        new.replace(target)
    elif not _exchange(new, target):
        old = new.with_name(new.name + "-old")
        target.rename(old)
        new.rename(target)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step where the system can; says whether it did."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return renameat2 is not None and not renameat2(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
    )
