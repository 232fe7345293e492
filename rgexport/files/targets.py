"""Files and folders that a user names with `-o`: checked, locked, and replaced in one step."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from rgexport.errors import RequestError
from rgexport.files.atomic import WINDOWS, TargetInUse, move, remove, remove_partials, replacing
from rgexport.files.paths import report_os_errors, windows_objection
from rgexport.progress import note
from rgexport.units import amount

Replaceable = Callable[[Path], bool]
"""Says whether an existing target is of a kind that `--force` may replace."""

COMPLETE = "complete"
"""The file in a folder of `continue_file` that becomes its target."""

_SMALLEST = 1 << 14  # bytes that any output takes at least
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replace_folder(target: Path, *, force: bool, replaceable: Replaceable) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that becomes `target` when the block ends well.

    Any exception removes it. A killed process leaves it, and the next run with the same target
    removes it. A kernel lock, released even by a kill, keeps two runs from writing one target. An
    existing target needs `force`, and to be `replaceable` or an empty folder.
    """
    check = partial(check_target, target, force=force, replaceable=replaceable)
    with _replaced(target, check) as new:
        new.mkdir()
        yield new


@contextmanager
def replace_file(target: Path, *, force: bool, replaceable: Replaceable) -> Iterator[Path]:
    """Yields the path of a new file that becomes `target`, see `replace_folder`."""
    check = partial(check_file_target, target, force=force, replaceable=replaceable)
    with _replaced(target, check) as new:
        yield new


@contextmanager
def continue_file(target: Path, *, force: bool, replaceable: Replaceable) -> Iterator[Path]:
    """Yields the path of a folder `NAME.partial` for work that a later run may continue.

    Any exception leaves it, unless it is empty; an interruption says so. When the block ends well,
    its file `COMPLETE` becomes `target`, and the folder is removed. See `replace_folder`.
    """
    check = partial(check_file_target, target, force=force, replaceable=replaceable)
    with _locked(target) as real:
        check()
        folder = real.with_name(f"{real.name}.partial")
        try:
            yield folder
        except KeyboardInterrupt:
            note("Interrupted. The same command goes on from here.")
            raise
        finally:
            with suppress(OSError):
                folder.rmdir()  # if nothing is in it
        check()
        move(folder / COMPLETE, real)
        remove(folder)


def write_text(text: str, path: Path) -> None:
    """Writes UTF-8, files in one step; bytes of a path that are not Unicode become JSON escapes."""
    data = f"{text}\n".encode("utf-8", "backslashreplace")
    real = Path(os.path.realpath(path))
    may_replace = (path.is_file() or not path.exists()) and os.access(real.parent, os.W_OK)
    with (
        report_os_errors(path, "write"),
        replacing(real) if may_replace else nullcontext(path) as new,
    ):
        new.write_bytes(data)


@contextmanager
def _replaced(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    with _locked(target) as real:
        remove_partials(real)
        check()
        with replacing(real) as new:
            yield new
            check()


def check_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    """Refuses a target that `replace_folder` would refuse, before any work is done.

    Raises RequestError for a file, a folder that may not be replaced, is a mount point or holds the
    current one, and a missing parent.
    """
    if os.path.lexists(require_writable(target)):
        if not target.is_dir():
            raise RequestError(f"{target} exists and is a file; pass another -o")
        may_replace = not any(target.iterdir()) or replaceable(target)
        _check_replaceable(target, may_replace, force, "holds")


def check_file_target(target: Path, *, force: bool, replaceable: Replaceable) -> None:
    if os.path.lexists(require_writable(target)):
        if target.is_dir():
            raise RequestError(f"{target} exists and is a folder; pass a file with -o")
        _check_replaceable(target, replaceable(target), force, "is")


def _check_replaceable(target: Path, may_replace: bool, force: bool, verb: str) -> None:
    if not may_replace:
        raise RequestError(
            f"{target} exists and {verb} something else than would be written; pass another -o"
        )
    if not force:
        raise RequestError(f"{target} exists; pass --force to replace it, or another -o")


def require_writable(target: Path) -> Path:
    """Returns the target's real path; RequestError where nothing can be written to it."""
    real = Path(os.path.realpath(target))
    if WINDOWS and (objection := windows_objection(target.name)):
        raise RequestError(f"cannot write {target}: the name {objection}; pass another -o")
    if Path.cwd().is_relative_to(real) or os.path.ismount(real):
        raise RequestError(
            f"cannot write {target}: a mount point, or it holds the current folder; pass another -o"
        )
    if not real.parent.is_dir():
        raise RequestError(
            f"cannot write {target}: there is no folder {real.parent}; make it first"
        )
    if not os.access(real.parent, os.W_OK):
        raise RequestError(
            f"cannot write {target}: {real.parent} is read-only, or not yours; pass another -o"
        )
    require_free_disk(real.parent, _SMALLEST)
    return real


def require_free_disk(folder: Path, needed_bytes: int) -> None:
    """Raises RequestError where the disk of `folder` has less room than is needed."""
    absolute = folder.absolute()
    existing = next((p for p in [absolute, *absolute.parents] if p.exists()), None)
    if existing is None:
        raise RequestError(f"cannot write {folder}: there is no drive {absolute.anchor}")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise RequestError(
            f"not enough space for {folder}: {amount(needed_bytes)} needed, "
            f"{amount(free)} free; free some or choose another disk"
        )


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    real = require_writable(target)
    path = real.with_name(f".{real.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(
            f"another run is writing {target}; wait for it, or pass another -o"
        ) from None
    except OSError as error:
        raise RequestError(f"cannot write {target}: {error.strerror}; pass another -o") from error
    try:
        yield real
    except TargetInUse as error:
        path_in_use = target if error.filename in (None, str(real)) else error.filename
        raise RequestError(
            f"cannot replace {path_in_use}: {error.strerror}; close the programs that use it, or "
            "pass another -o"
        ) from error
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise RequestError(
            f"no space left while writing {target}; free some or choose another disk"
        ) from error
    finally:
        # Removed while it is held: a process that has opened it meanwhile sees that it has no
        # name. Windows removes no open file; there, the release removes it, unless another run
        # has opened it.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
