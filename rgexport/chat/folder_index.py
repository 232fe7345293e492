"""An index of the state files in a folder, which other processes may change, too."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rgexport.chat.state_file import Key
from rgexport.files.atomic import remove_abandoned

_FOLDER = re.compile(r"[0-9a-f]{16}-\d+(-[0-9a-f]{16})?")
"""Name of the folder of an artifact; earlier versions had one for each model and window."""

_FILE = re.compile(r"(\d+)-([0-9a-f]{64})\.state")
"""Name of a state file: the number of tokens and their hash."""

FileName = tuple[str, str]
"""Name of an artifact's folder, and of a file in it."""


@dataclass
class _File:
    """A state file: its size, its last use (seconds since 1970), and whether it has logits."""

    nbytes: int
    used: float
    has_logits: bool | None = None


class FolderIndex:
    """The state files of all artifacts in a folder `root`; its subfolder `name` is this artifact's.

    Only the folder's thread calls `scan`, `trim`, `add`, `touch` and `discard`; any thread may look
    states up.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self._name = name
        self._files: dict[FileName, _File] = {}
        self.lengths: frozenset[int] = frozenset()
        """Numbers of tokens before the states of this artifact."""

    def name_of(self, key: Key) -> FileName:
        """Returns the name of the file of a state of this artifact."""
        length, digest = key
        return self._name, f"{length}-{digest}.state"

    def has(self, key: Key) -> bool:
        """Returns whether there is a file of this state."""
        return self.name_of(key) in self._files

    def has_logits(self, key: Key) -> bool | None:
        """Returns whether the state has logits; None if only its file knows."""
        file = self._files.get(self.name_of(key))
        return None if file is None else file.has_logits

    def add(self, key: Key, nbytes: int, *, has_logits: bool) -> None:
        """Adds a file that was just written."""
        self._files[self.name_of(key)] = _File(nbytes, time.time(), has_logits)
        self.lengths |= {key[0]}

    def touch(self, key: Key, *, has_logits: bool) -> None:
        """Notes that a file was just read."""
        file = self._files.get(self.name_of(key))
        if file:
            file.used = time.time()
            file.has_logits = has_logits

    def discard(self, key: Key) -> None:
        """Forgets a file that no longer exists."""
        files = dict(self._files)
        files.pop(self.name_of(key), None)
        self._set_files(files)

    def scan(self) -> None:
        """Reads the names on the disk; removes incomplete files of killed processes."""
        files = dict[FileName, _File]()
        for name, entry in self._entries():
            with suppress(OSError):  # another process has removed it meanwhile
                status = entry.stat()
                known = self._files.get(name) or _File(0, 0.0)
                used = max(status.st_mtime, known.used)
                files[name] = _File(status.st_size, used, known.has_logits)
        self._set_files(files)

    def trim(self, max_bytes: int) -> None:
        """Removes the least recently used files, if there are more than `max_bytes` in all."""
        if self._nbytes() <= max_bytes:
            return
        self.scan()  # other processes may have used files meanwhile

        files = dict(self._files)
        nbytes = self._nbytes()
        for name, file in sorted(files.items(), key=lambda item: item[1].used):
            if nbytes <= max_bytes:
                break
            nbytes -= file.nbytes
            del files[name]
            with suppress(OSError):
                self._root.joinpath(*name).unlink()
        self._set_files(files)

    def _nbytes(self) -> int:
        return sum(file.nbytes for file in self._files.values())

    def _set_files(self, files: dict[FileName, _File]) -> None:
        self._files = files
        lengths = set()
        for folder, name in files:
            if folder == self._name:
                lengths.add(int(name.partition("-")[0]))
        self.lengths = frozenset(lengths)

    def _entries(self) -> Iterator[tuple[FileName, os.DirEntry[str]]]:
        """Yields the state files of all artifacts; removes incomplete files between them."""
        for folder in _list_entries(self._root):
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir()):
                continue
            for entry in _list_entries(Path(folder.path)):
                if _FILE.fullmatch(entry.name):
                    yield (folder.name, entry.name), entry
                else:
                    remove_abandoned(entry)


def _list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Returns the entries of a folder; none if another process has removed it."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
