"""Hashes of files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rgexport.progress import Advance

_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """SHA-256 in hexadecimal and size in bytes of one file."""

    sha256: str
    size: int


def hash_file(
    path: Path,
    advance: Advance = lambda done: None,
    start: int = 0,
    length: int | None = None,
) -> FileRecord:
    """Hashes `length` bytes of a file from byte `start`, or all; reports progress to `advance`."""
    digest, size, block = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(block if length is None else block[: length - size]):
            digest.update(block[:count])
            size += count
            advance(count)
    return FileRecord(digest.hexdigest(), size)
