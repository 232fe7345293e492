"""The folder in which states of the model are saved, so that a later process can continue them.

One thread reads and writes all files, because disks fill up, fail, hang and recover. Other threads
only queue reads and writes, and a request waits at most `READ_SECONDS` for a read. The queue of
unwritten states is limited. After a failure, writing pauses for a while.
"""

import math
import os
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rgexport.chat.state_file import Key, SavedState, read_state, write_state
from rgexport.errors import RequestError, system_error
from rgexport.export.manifest import Identity
from rgexport.files.atomic import remove_abandoned
from rgexport.griffin.state import State
from rgexport.progress import warn

_FOLDER = re.compile(r"[0-9a-f]{16}-\d+(-[0-9a-f]{16})?")
"""Name of the folder of an artifact; earlier versions had one for each model and window."""
_FILE = re.compile(r"(\d+)-([0-9a-f]{64})\.state")

FileName = tuple[str, str]
BACK_OFF_SECONDS = 1.0, 60.0
"""Pause of writing after a first failure, and its maximum: each further failure doubles it."""
READ_SECONDS = 5.0
"""Longest time that a request waits for a state; then the model reads its prompt instead."""
CLOSE_SECONDS = 10.0
_RETRY_SECONDS = 60.0
"""Time until a file is tried again after the system could not read it."""
_WARN_AGAIN_SECONDS = 600.0
_SCAN_SECONDS, _SCAN_FACTOR = 1.0, 20
"""Pause between scans for files of other processes: so many seconds, or so many times as long as a
scan takes, whichever is longer."""
_MIN_WAITING = 4
"""Number of states that may wait to be written whatever their size."""
_OVERHEAD_BYTES = 4096
"""Estimated memory of the Python objects of a waiting state."""


@dataclass
class _File:
    nbytes: int
    used: float
    has_logits: bool | None = None


class FolderIndex:
    """The state files of all artifacts in a folder `root`, the least recently used first.

    States are looked up in its subfolder `name`. Only `scan` and `trim`, of one thread, use the
    disk.
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

    def name_of(self, key: Key) -> FileName:
        return self._name, f"{key[0]}-{key[1]}.state"

    def has(self, key: Key) -> bool:
        with self._lock:
            return self.name_of(key) in self._files

    def has_logits(self, key: Key) -> bool | None:
        """Returns whether the state has logits; None if only its file knows."""
        with self._lock:
            file = self._files.get(self.name_of(key))
            return None if file is None else file.has_logits

    def add(self, key: Key, nbytes: int, *, has_logits: bool) -> None:
        with self._lock:
            self._discard(self.name_of(key))
            self._insert(self.name_of(key), _File(nbytes, time.time(), has_logits))

    def touch(self, key: Key, *, has_logits: bool) -> None:
        with self._lock:
            if file := self._files.get(self.name_of(key)):
                file.used, file.has_logits = time.time(), has_logits
                self._files.move_to_end(self.name_of(key))

    def discard(self, key: Key) -> None:
        with self._lock:
            self._discard(self.name_of(key))

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
        self._count(name, file, 1)

    def _discard(self, name: FileName) -> None:
        if file := self._files.pop(name, None):
            self._count(name, file, -1)

    def _count(self, name: FileName, file: _File, change: int) -> None:
        self._nbytes += change * file.nbytes
        if name[0] == self._name:
            length = int(name[1].partition("-")[0])
            self._lengths[length] += change
            if not self._lengths[length]:
                del self._lengths[length]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


class Fetch:
    """A queued or finished read of a saved state from which `length` tokens can be continued.

    It reads the first usable one of `keys`, the best first, and then calls `callbacks`.
    """

    def __init__(self, keys: Sequence[Key], length: int) -> None:
        self.keys, self.length = keys, length
        self.state: SavedState | None = None
        self.callbacks: list[Callable[[], None]] = []
        self._deadline = time.monotonic() + READ_SECONDS
        self._ended = threading.Event()

    @property
    def pending(self) -> bool:
        return not self._ended.is_set() and time.monotonic() < self._deadline

    def end(self, state: SavedState | None) -> None:
        self.state = state
        self._ended.set()
        for callback in self.callbacks:
            callback()


class StateFolder:
    """A cache on disk: key of a prefix → the state that one artifact computed, one file per state.

    Files have a hash of the text instead of the text. They are written atomically, so a killed
    process leaves the folder intact, and several processes may use it.
    """

    def __init__(
        self,
        root: Path,
        identity: Identity,
        shapes: dict[str, tuple[int, ...]],
        *,
        artifact: str,
        vocab_size: int,
        max_bytes: int,
        waiting_bytes: int,
        precision: str | None = None,
    ) -> None:
        """Opens the folder of an artifact (a hash) in `root`, and starts the thread.

        `max_bytes` limits the files of all artifacts in `root`, `waiting_bytes` the memory of
        states that wait to be written.
        """
        name = f"{identity.weights[:16]}-{identity.window}-{artifact[:16]}"
        self._folder, self._index = root / name, FolderIndex(root, name)
        self._identity, self._shapes, self._artifact = identity, shapes, artifact
        self._vocab_size, self._precision = vocab_size, precision
        self._max_bytes, self._max_waiting_bytes = max_bytes, waiting_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._index.scan()
        except OSError as error:
            raise RequestError(f"cannot use {self._folder}: {error.strerror}") from None
        self._waiting: OrderedDict[Key, SavedState] = OrderedDict()
        """States to write, the oldest first."""
        self._waiting_bytes = 0
        self._fetches: OrderedDict[Key, Fetch] = OrderedDict()
        """First key of a fetch → the fetch, the oldest first."""
        self._retry_at: dict[Key, float] = {}
        """Key of a file that could not be used → when it may be tried again."""
        self._warned: dict[tuple[str, object], float] = {}
        """Kind of failure → when it was last reported."""
        self._busy_since: float | None = None
        self._back_off, self._write_at, self._scan_at = 0.0, 0.0, 0.0
        # Guards `_waiting`, `_fetches` and `_closed`, and wakes the folder's thread.
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="state folder", daemon=True)
        self._thread.start()

    def lengths(self) -> set[int]:
        """Returns the lengths, in tokens, of the saved states; none while the disk hangs."""
        started = self._busy_since
        hangs = started is not None and time.monotonic() - started > READ_SECONDS
        return set() if hangs else self._index.lengths()

    def has(self, key: Key) -> bool:
        return self._index.has(key) and time.monotonic() >= self._retry_at.get(key, 0.0)

    def has_logits(self, key: Key) -> bool | None:
        return self._index.has_logits(key)

    def save(self, key: Key, state: State, logits: np.ndarray | None) -> None:
        """Queues a state to be written unless it is saved; a full queue loses its oldest."""
        if self.has(key) and (logits is None or self.has_logits(key)):
            return
        with self._changed:
            queued = self._waiting.get(key)
            if self._closed or (queued and queued.logits is not None and logits is None):
                return
            saved = SavedState(self._identity, key, state, logits=logits, artifact=self._artifact)
            if queued:
                self._pop_waiting(key)
            self._waiting[key] = saved
            self._waiting_bytes += saved.nbytes + _OVERHEAD_BYTES
            most = self._max_waiting_bytes
            while len(self._waiting) > _MIN_WAITING and self._waiting_bytes > most:
                self._pop_waiting(next(iter(self._waiting)))
            self._changed.notify()

    def fetch(self, keys: Sequence[Key], length: int, callback: Callable[[], None]) -> Fetch:
        with self._changed:
            fetch = self._fetches.setdefault(keys[0], Fetch(keys, length))
            fetch.callbacks.append(callback)
            self._changed.notify()
        return fetch

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._changed:
                lost = len(self._waiting)
                self._waiting.clear()
            warn(f"{self._folder} did not answer within {seconds:g} s; {lost} states are not saved")

    def _run(self) -> None:
        while task := self._next_task():
            self._busy_since = time.monotonic()
            task()
            self._busy_since = None

    def _next_task(self) -> Callable[[], None] | None:
        """Waits for work: reads go before writes, writes before scans. Returns None at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                if self._fetches:
                    return partial(self._read, next(iter(self._fetches.values())))
                if self._waiting and (self._closed or now >= self._write_at):
                    key = next(iter(self._waiting))
                    return partial(self._write, key, self._pop_waiting(key))
                if self._closed:
                    return None
                if now >= self._scan_at:
                    return self._scan
                due = min(self._scan_at, self._write_at) if self._waiting else self._scan_at
                self._changed.wait(due - now)

    def _read(self, fetch: Fetch) -> None:
        state = None
        for key in fetch.keys:
            state = self._load(key)
            if state and (key[0] < fetch.length or state.logits is not None):
                break
        with self._changed:
            del self._fetches[fetch.keys[0]]
        fetch.end(state)

    def _load(self, key: Key) -> SavedState | None:
        try:
            with suppress(OSError):  # the disk may be read-only
                os.utime(self._path(key))  # marks the file as recently used
            saved = read_state(self._path(key), self._shapes)
        except Exception as error:  # no file may end the thread
            system = system_error(error)
            if isinstance(system, FileNotFoundError):
                self._index.discard(key)
                return None
            self._retry_at[key] = time.monotonic() + (_RETRY_SECONDS if system else math.inf)
            self._warn("a saved state is not used", error)
            return None
        logits = saved.logits
        has_other_size = logits is not None and logits.shape != (self._vocab_size,)
        if has_other_size or (saved.key, saved.artifact) != (key, self._artifact):
            self._retry_at[key] = math.inf
            return None
        self._index.touch(key, has_logits=logits is not None)
        return saved

    def _path(self, key: Key) -> Path:
        return self._folder / self._index.name_of(key)[1]

    def _write(self, key: Key, saved: SavedState) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            nbytes = write_state(self._path(key), saved, precision=self._precision)
            self._index.add(key, nbytes, has_logits=saved.logits is not None)
            self._retry_at.pop(key, None)
            self._index.trim(self._max_bytes)
            self._back_off = 0.0
        except Exception as error:
            shortest, longest = BACK_OFF_SECONDS
            self._back_off = min(max(shortest, 2 * self._back_off), longest)
            self._write_at = time.monotonic() + self._back_off
            self._warn("states are not saved at the moment", error)

    def _scan(self) -> None:
        began = time.monotonic()
        try:
            self._index.scan()
        except Exception as error:
            self._warn("states of other processes are not seen at the moment", error)
        now = time.monotonic()
        self._scan_at = now + max(_SCAN_SECONDS, _SCAN_FACTOR * (now - began))
        self._retry_at = {key: at for key, at in self._retry_at.items() if at > now}

    def _warn(self, what: str, error: Exception) -> None:
        system = system_error(error)
        kind, now = (what, system.errno if system else type(error)), time.monotonic()
        if now - self._warned.get(kind, -_WARN_AGAIN_SECONDS) >= _WARN_AGAIN_SECONDS:
            self._warned[kind] = now
            warn(f"{what}: {error}")

    def _pop_waiting(self, key: Key) -> SavedState:
        saved = self._waiting.pop(key)
        self._waiting_bytes -= saved.nbytes + _OVERHEAD_BYTES
        return saved
