"""Names and kinds of files, checked before a file is opened."""

import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rgexport.errors import RequestError, system_reason

MAX_SETTINGS_BYTES = 8 << 20
"""Limit for files of settings: a manifest has 2 MB. Parsed JSON takes up to twenty times its
size."""
MAX_TEXT_BYTES = 64 << 20
"""Limit for a text that is read as a whole: a hundred times a long novel."""
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE
)


def without_ending(name: str, endings: Iterable[str]) -> str:
    """Returns `name` without its ending, if that is one of `endings`, unlike `Path.stem`."""
    return name.removesuffix(next(filter(name.endswith, endings), ""))


def stays_inside(name: str) -> bool:
    """Whether a path from an untrusted file leads into its folder on every system."""
    path = PurePosixPath(name)
    plain = name.isprintable() and not set(name) & set("\\:") and path.parts
    return bool(plain) and not path.is_absolute() and ".." not in path.parts


def windows_objection(name: str) -> str:
    """Returns why Windows could not store a file of this name, or "" if it could."""
    if _DEVICE.fullmatch(name):
        return "is the name of a device"
    if bad := sorted({c for c in name if c in '<>:"|?*\\/' or c < " "}):
        return f"has {' '.join(map(repr, bad))}, which names cannot have"
    return "ends in a dot or space, which would be lost" if name[-1:] in (".", " ") else ""


@contextmanager
def report_os_errors(path: object, verb: str = "read") -> Iterator[None]:
    """Raises errors of the system as RequestError: `path` cannot be read, or be written."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"cannot {verb} {path}: {system_reason(error)}") from error


def require_regular(path: Path) -> int:
    """Returns the size of a file; RequestError for a folder, or what could block or never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise RequestError(f"{path} cannot be read: it is {kind}; expected a file")
    return status.st_size


def read_regular(path: Path, most: int = MAX_SETTINGS_BYTES) -> bytes:
    """Returns the content of a file of at most `most` bytes; RequestError for anything else."""
    size = require_regular(path)
    if size > most:
        raise RequestError(f"{path} has {size} bytes; expected at most {most}")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Returns a UTF-8 text; RequestError if it is unreadable, too large or another encoding."""
    try:
        with report_os_errors(path):
            return read_regular(path, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text") from None
