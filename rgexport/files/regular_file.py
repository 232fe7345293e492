"""Refuses pipes and devices before they are opened: reading them could block or never end."""

import stat
from pathlib import Path

from rgexport.errors import RequestError

MAX_SETTINGS_BYTES = 8 << 20
"""The largest file of settings that is read: far above what any needs (a manifest has 2 MB). Parsed
JSON takes up to twenty times its size."""
MAX_TEXT_BYTES = 64 << 20
"""The largest text that is read as a whole: a hundred times a long novel."""


def require_regular(path: Path) -> int:
    """The size of a file.

    Raises:
        RequestError: it is a folder, a pipe or a device.
        OSError: there is none.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise RequestError(f"{path} cannot be read: it is {what}; expected a file")
    return found.st_size


def read_regular(path: Path, most: int = MAX_SETTINGS_BYTES) -> bytes:
    """The content of a small file.

    Raises:
        RequestError: it is a folder, a pipe or a device, or has more than `most` bytes.
        OSError: it cannot be read.
    """
    size = require_regular(path)
    if size > most:
        raise RequestError(f"{path} has {size} bytes; expected at most {most}")
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        RequestError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_regular(path, MAX_TEXT_BYTES).decode()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text") from None
