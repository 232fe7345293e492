"""Several files as one input, and the folder that they are put into.

An input is a list of entries: kind (`F` a file, `L` a link, `P` a pipe), name, content.
"""

import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_LENGTHS = struct.Struct("<cHI")
FILE, LINK, PIPE = b"F", b"L", b"P"


@dataclass(frozen=True)
class Entry:
    """A file with its content, or a link with what it points to."""

    content: bytes
    kind: bytes = FILE


Files = dict[str, Entry]
"""Relative name → entry."""


class NotAnInput(Exception):
    """Bytes that no mutator wrote."""


def pack(files: Files) -> bytes:
    """The files as one input."""
    parts = []
    for name, entry in files.items():
        encoded = os.fsencode(name)
        parts.append(_LENGTHS.pack(entry.kind, len(encoded), len(entry.content)))
        parts += encoded, entry.content
    return b"".join(parts)


def unpack(data: bytes) -> Files:
    """The inverse of `pack`.

    Raises:
        NotAnInput: no such list, or a name that leads out of the folder.
    """
    files, at = {}, 0
    while at < len(data):
        if at + _LENGTHS.size > len(data):
            raise NotAnInput
        kind, name, content = _LENGTHS.unpack_from(data, at)
        start = at + _LENGTHS.size + name
        at = start + content
        text = os.fsdecode(data[start - name : start])
        parts = PurePosixPath(text).parts
        plain = text and "\0" not in text and ".." not in parts and not text.startswith("/")
        if at > len(data) or kind not in (FILE, LINK, PIPE) or not plain:
            raise NotAnInput
        files[text] = Entry(data[start:at], kind)
    return files


def files_in(folder: Path) -> Files:
    """The files of a folder, such as an artifact that was just made."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): Entry(p.read_bytes()) for p in found}


def place(data: bytes, folder: Path) -> None:
    """Puts an input into a folder, which then holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, entry in unpack(data).items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.kind == LINK:
                os.symlink(entry.content, path)
            elif entry.kind == PIPE:
                os.mkfifo(path)
            else:
                path.write_bytes(entry.content)
        except (OSError, ValueError):  # a name too long, or of a file that is a folder too
            raise NotAnInput from None
