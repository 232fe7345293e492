"""An index, in memory, of the files of a folder of states."""

import os
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rgexport.chat.prefix_key import Key
from rgexport.files.atomic import remove_abandoned

_FOLDER = re.compile(r"[0-9a-f]{16}-\d+(-[0-9a-f]{16})?")
"""Name of the folder of an artifact; earlier versions had one for each model and window."""
_FILE = re.compile(r"(\d+)-([0-9a-f]{64})\.state")

FileName = tuple[str, str]
"""Names of the artifact's folder and of the file in it."""


def file_name(key: Key) -> str:
    return f"{key[0]}-{key[1]}.state"


@dataclass
class _File:
    nbytes: int
    used: float
    has_logits: bool | None = None


class FolderIndex:
    """The state files of all artifacts in a folder `root`, the least recently used first.

    States are looked up in its subfolder `name`. Only one thread calls `scan` and `trim`, which use
    the disk. Any thread may call the other methods, which never wait for the disk.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name
        self._files: OrderedDict[FileName, _File] = OrderedDict()
        self._lengths = Counter[int]()
        self._nbytes = 0
        self._lock = threading.Lock()

    def lengths(self) -> set[int]:
        with self._lock:
            return set(self._lengths)

    def has(self, key: Key) -> bool:
        with self._lock:
            return (self._name, file_name(key)) in self._files

    def has_logits(self, key: Key) -> bool | None:
        """Returns whether the state has logits; None if only its file knows."""
        with self._lock:
            file = self._files.get((self._name, file_name(key)))
            return None if file is None else file.has_logits

    def add(self, key: Key, nbytes: int, *, has_logits: bool) -> None:
        with self._lock:
            name = self._name, file_name(key)
            self._discard(name)
            self._insert(name, _File(nbytes, time.time(), has_logits))

    def touch(self, key: Key, *, has_logits: bool) -> None:
        with self._lock:
            name = self._name, file_name(key)
            if file := self._files.get(name):
                file.used, file.has_logits = time.time(), has_logits
                self._files.move_to_end(name)

    def discard(self, key: Key) -> None:
        with self._lock:
            self._discard((self._name, file_name(key)))

    def scan(self) -> None:
        """Compares the index with the disk; removes incomplete files of killed processes."""
        names = set(self._names_on_disk())
        with self._lock:
            for name in self._files.keys() - names:
                self._discard(name)
            unknown = names - self._files.keys()
        sizes = [(name, status) for name in unknown if (status := self._status(name))]
        with self._lock:
            for name, status in sorted(sizes, key=lambda pair: pair[1].st_mtime):
                if name not in self._files:
                    self._insert(name, _File(status.st_size, status.st_mtime))

    def trim(self, max_bytes: int) -> None:
        """Removes the least recently used files until the rest fits."""
        while self._nbytes > max_bytes and self._files:
            with self._lock:
                name, file = next(iter(self._files.items()))
                self._discard(name)
            status = self._status(name)
            if status and status.st_mtime > file.used + 1:  # another process has used it
                with self._lock:
                    self._insert(name, _File(status.st_size, status.st_mtime, file.has_logits))
                continue
            with suppress(OSError):
                self._root.joinpath(*name).unlink()

    def _names_on_disk(self) -> Iterator[FileName]:
        for folder in _entries(self._root):
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir()):
                continue
            for entry in _entries(Path(folder.path)):
                if _FILE.fullmatch(entry.name):
                    yield folder.name, entry.name
                else:
                    remove_abandoned(entry)

    def _status(self, name: FileName) -> os.stat_result | None:
        with suppress(OSError):
            return self._root.joinpath(*name).stat()
        return None

    def _insert(self, name: FileName, file: _File) -> None:
        self._files[name] = file
        self._nbytes += file.nbytes
        if name[0] == self._name:
            self._lengths[_length(name[1])] += 1

    def _discard(self, name: FileName) -> None:
        if (file := self._files.pop(name, None)) is None:
            return
        self._nbytes -= file.nbytes
        if name[0] == self._name:
            length = _length(name[1])
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]


def _length(name: str) -> int:
    return int(name.partition("-")[0])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Lists a folder; a missing one is empty."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
