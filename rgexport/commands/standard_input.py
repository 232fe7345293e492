"""Reads texts from files and from the standard input."""

import os
import stat
import sys
from pathlib import Path
from threading import Thread

from rgexport.errors import RequestError
from rgexport.files.paths import read_text
from rgexport.progress import note

SECONDS = 5.0
"""Longest wait for the first byte of a pipe: one that a program inherits may never give any."""


def read_file_or_stdin(file: Path) -> str:
    return read_text(file) if str(file) != "-" else _read_stdin(b"")


def piped_text(option: str) -> str:
    """Returns the text of a pipe, or of a file in the place of stdin, that no option asks for.

    Returns "" if it is blank, or if nothing comes in time; `option` waits longer.
    """
    try:
        descriptor = sys.stdin.fileno()
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    except (OSError, ValueError):
        return ""
    if kind not in (stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK):
        return ""
    first: list[bytes] = []
    # Not by sys.stdin, which a thread that waits would lock until the interpreter ends.
    reader = Thread(target=lambda: first.append(os.read(descriptor, 1)), daemon=True)
    reader.start()
    reader.join(SECONDS)
    if not first:
        note(f"Nothing came from stdin in {SECONDS:.0f} s, so it is not read; {option} - waits.")
        return ""
    text = _read_stdin(first[0])
    if text.strip():
        note(f"{len(text):,} characters are read from stdin (`< /dev/null` prevents it).")
    return text if text.strip() else ""


def _read_stdin(first: bytes) -> str:
    try:
        if not first:
            return sys.stdin.read()
        return (first + sys.stdin.buffer.read()).decode(sys.stdin.encoding)
    except UnicodeDecodeError as error:
        raise RequestError(f"the input is not UTF-8 text: {error}") from None
