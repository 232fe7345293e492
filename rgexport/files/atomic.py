"""Folders and files that appear complete or not at all.

A folder is replaced by `renameat2`: with two renames there would be a moment without one
(`tests/files/test_atomic.py`).
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from rgexport.errors import RequestError
from rgexport.files.names import windows_objection
from rgexport.progress import warn
from rgexport.units import amount

Replaceable = Callable[[Path], bool]
"""Says whether an existing target is of a kind that `--force` may replace."""

COMPLETE = "complete"
"""The file in a folder of `continue_file` that becomes its target."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_WINDOWS = os.name == "nt"
_PAUSES = 0.05, 0.1, 0.2, 0.4, 0.4
"""Seconds between attempts to rename or remove what another program has open."""


@contextmanager
def replace_folder(target: Path, *, force: bool, replaceable: Replaceable) -> Iterator[Path]:
    """Gives a temporary folder beside `target` that becomes `target` when the block ends well.

    Any exception removes it. A process that is killed leaves a folder `.NAME.partial-…`, which the
    next run with the same target removes. A kernel lock, released even by a kill, keeps two runs
    from writing one target.

    Args:
        target: the folder to make; its parent must exist.
        force: whether an existing target may be replaced.
        replaceable: whether it is of a kind that may be; an empty folder always is.

    Raises:
        RequestError: see `check_target`; or the parent is not writable, another run is writing the
            target, or the disk is full.
    """
    check = partial(check_target, target, force=force, replaceable=replaceable)
    with _replaced(target, check) as new:
        new.mkdir()
        yield new


@contextmanager
def replace_file(target: Path, *, force: bool, replaceable: Replaceable) -> Iterator[Path]:
    """As `replace_folder`, for a file that the block writes."""
    check = partial(check_file_target, target, force=force, replaceable=replaceable)
    with _replaced(target, check) as new:
        yield new


@contextmanager
def continue_file(target: Path, *, force: bool, replaceable: Replaceable) -> Iterator[Path]:
    """As `replace_file`, for work that a later run may continue.

    Gives the place of a folder `NAME.partial` beside `target`, which may hold what an earlier run
    has left. Any exception leaves it there. When the block ends well, its file `COMPLETE` becomes
    `target`, and the rest is removed.
    """
    real = check_place(target)
    with _locked(target, real), _no_space_is_a_request(target):
        check_file_target(target, force=force, replaceable=replaceable)
        folder = real.with_name(f"{real.name}.partial")
        yield folder
        check_file_target(target, force=force, replaceable=replaceable)
        _move(folder / COMPLETE, real)
        _remove(folder)


@contextmanager
def _no_space_is_a_request(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise RequestError(
            f"no space left while writing {target}; free some or choose another disk"
        ) from error


@contextmanager
def _replaced(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    real = check_place(target)
    with _locked(target, real), _no_space_is_a_request(target):
        _remove_stale(real)
        check()
        new = real.with_name(f".{real.name}.partial-{secrets.token_hex(4)}")
        try:
            yield new
            check()
            _move(new, real)
        finally:
            _remove(new)


def check_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    """Refuses a target that `replace_folder` would refuse, before any work is done.

    Raises:
        RequestError: it is a file, or a folder that may not be replaced; it holds the current
            folder, is a mount point, or has no parent.
    """
    if os.path.lexists(check_place(target)):
        if not target.is_dir():
            raise RequestError(f"{target} exists and is a file; pass another -o")
        may_replace = not any(target.iterdir()) or replaceable(target)
        _check_replaceable(target, may_replace, force, "holds")


def check_file_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    """Refuses a target that `replace_file` would refuse, before any work is done.

    Raises:
        RequestError: it is a folder, or a file that may not be replaced, or has no parent.
    """
    if os.path.lexists(check_place(target)):
        if target.is_dir():
            raise RequestError(f"{target} exists and is a folder; pass a file with -o")
        _check_replaceable(target, replaceable(target), force, "is")


def _check_replaceable(target: Path, may_replace: bool, force: bool, verb: str) -> None:
    if not may_replace:
        raise RequestError(
            f"{target} exists and {verb} something else than what would be written there; "
            "pass another -o"
        )
    if not force:
        raise RequestError(f"{target} exists; pass --force to replace it, or another -o")


def check_place(target: Path) -> Path:
    """The target's real path.

    Raises:
        RequestError: nothing can be put there, whatever is there.
    """
    real = Path(os.path.realpath(target))
    if _WINDOWS and (objection := windows_objection(target.name)):
        raise RequestError(f"cannot write {target}: the name {objection}; pass another -o")
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
    absolute = folder.absolute()
    there = next((p for p in [absolute, *absolute.parents] if p.exists()), None)
    if there is None:
        raise RequestError(f"cannot write {folder}: there is no drive {absolute.anchor}")
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise RequestError(
            f"not enough space for {folder}: {amount(needed_bytes)} needed, "
            f"{amount(free)} free; free some or choose another disk"
        )


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
    except OSError as error:
        raise RequestError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened it meanwhile sees that it has no name.
        # Windows removes no open file; there, the release removes it, unless another run has
        # opened it.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _remove_stale(target: Path) -> None:
    """Removes what killed runs left beside `target`; only for the holder of its lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}(-old)?")
    for entry in target.parent.iterdir():
        if pattern.fullmatch(entry.name):
            _remove(entry)


def _remove(entry: Path) -> None:
    """Removes a file or a folder, read-only or not; warns where it cannot."""
    with suppress(OSError):
        if entry.is_dir():
            for folder, _, _ in os.walk(entry):
                os.chmod(folder, 0o700)  # what is in a read-only folder cannot be removed
            shutil.rmtree(entry, onerror=_remove_read_only)
        else:
            _retry(partial(entry.unlink, missing_ok=True))
    if os.path.lexists(entry):
        warn(f"{entry} cannot be removed; remove it yourself")


def _remove_read_only(remove: Callable[[str], object], path: str, error: object) -> None:
    """Removes what `shutil.rmtree` could not: Windows keeps read-only files, and open ones."""
    with suppress(OSError):
        if remove in (os.unlink, os.rmdir):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
            _retry(partial(remove, path))


def _move(new: Path, target: Path) -> None:
    """Renames; where the target is a folder, `new` is the old one afterwards, or is gone.

    Raises:
        RequestError: a program has a file of `target` open, and the system does not allow that.
    """
    try:
        if not target.is_dir():  # a rename replaces a file in one step
            rename(new, target)
        elif not _exchange(new, target):
            _replace_in_two_steps(new, target)
    except PermissionError as error:
        raise RequestError(
            f"cannot replace {target}: {error.strerror}; close the programs that use it, or pass "
            "another -o"
        ) from error


def _replace_in_two_steps(new: Path, target: Path) -> None:
    old = new.with_name(new.name + "-old")
    rename(target, old)
    try:
        rename(new, target)
    except OSError:
        rename(old, target)
        raise
    _remove(old)


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder; replaces a file that is there, even if it is read-only.

    Raises:
        OSError: it cannot be done, even a second later.
    """
    try:
        _retry(partial(os.replace, source, target))
    except PermissionError:
        if not _WINDOWS or not target.is_file() or target.stat().st_mode & stat.S_IWUSR:
            raise
        target.chmod(0o600)  # Windows replaces no read-only file
        os.replace(source, target)


def _retry(change: Callable[[], object]) -> None:
    """Makes a change of a folder; on Windows, tries again for a second.

    There, virus scanners and search indexes hold a new file open for a moment, in which nobody can
    rename or remove it.
    """
    for seconds in _PAUSES if _WINDOWS else ():
        try:
            change()
            return
        except PermissionError:
            time.sleep(seconds)
    change()


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return renameat2 is not None and not renameat2(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
    )
