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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rgexport.artifacts.manifest import Identity
from rgexport.chat.state_file import Key, SavedState, read_state, state_bytes, write_state
from rgexport.errors import system_error
from rgexport.files.atomic import remove_abandoned
from rgexport.files.paths import report_os_errors
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
_RETRY_SECONDS = 60.0  # time until a file is tried again after the system could not read it
_WARN_AGAIN_SECONDS = 600.0
_SCAN_SECONDS, _SCAN_FACTOR = 1.0, 20
"""Pause between scans for files of other processes: so many seconds, or so many times as long as a
scan takes, whichever is longer."""
_MIN_WAITING = 4  # number of states that may wait to be written whatever their size


@dataclass
class _File:
    nbytes: int
    used: float
    has_logits: bool | None = None


class FolderIndex:
    """The state files of all artifacts in a folder `root`; its subfolder `name` is this artifact's.

    One thread changes it and uses the disk; any thread may look states up.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name
        self._files: dict[FileName, _File] = {}
        self.lengths: frozenset[int] = frozenset()
        """Numbers of tokens before the states of this artifact."""

    def name_of(self, key: Key) -> FileName:
        return self._name, f"{key[0]}-{key[1]}.state"

    def has(self, key: Key) -> bool:
        return self.name_of(key) in self._files

    def has_logits(self, key: Key) -> bool | None:
        """Returns whether the state has logits; None if only its file knows."""
        file = self._files.get(self.name_of(key))
        return None if file is None else file.has_logits

    def add(self, key: Key, nbytes: int, *, has_logits: bool) -> None:
        self._files[self.name_of(key)] = _File(nbytes, time.time(), has_logits)
        self.lengths |= {key[0]}

    def touch(self, key: Key, *, has_logits: bool) -> None:
        if file := self._files.get(self.name_of(key)):
            file.used, file.has_logits = time.time(), has_logits

    def discard(self, key: Key) -> None:
        files = dict(self._files)
        files.pop(self.name_of(key), None)
        self._set_files(files)

    def scan(self) -> None:
        """Reads the names on the disk; removes incomplete files of killed processes."""
        files = dict[FileName, _File]()
        for name, entry in self._entries():
            with suppress(OSError):  # another process has removed it meanwhile
                status = entry.stat()
                file = self._files.get(name) or _File(0, 0.0)
                used = max(status.st_mtime, file.used)
                files[name] = _File(status.st_size, used, file.has_logits)
        self._set_files(files)

    def trim(self, max_bytes: int) -> None:
        """Removes the least recently used files, if there are more than `max_bytes` in all."""
        if self._nbytes() <= max_bytes:
            return
        self.scan()  # other processes may have used files meanwhile
        files, nbytes = dict(self._files), self._nbytes()
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
        lengths = (name.partition("-")[0] for folder, name in files if folder == self._name)
        self.lengths = frozenset(map(int, lengths))

    def _entries(self) -> Iterator[tuple[FileName, os.DirEntry[str]]]:
        for folder in _listed(self._root):
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir()):
                continue
            for entry in _listed(Path(folder.path)):
                if _FILE.fullmatch(entry.name):
                    yield (folder.name, entry.name), entry
                else:
                    remove_abandoned(entry)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


class Fetch:
    """A queued or finished read of a saved state from which `length` tokens can be continued.

    It reads the first usable one of `keys`, the best first.
    """

    def __init__(self, keys: Sequence[Key], length: int) -> None:
        self.keys, self.length = keys, length
        self.found = Future[SavedState | None]()
        self._deadline = time.monotonic() + READ_SECONDS

    @property
    def pending(self) -> bool:
        return not self.found.done() and time.monotonic() < self._deadline

    @property
    def state(self) -> SavedState | None:
        return self.found.result() if self.found.done() else None


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
        with report_os_errors(self._folder, "use"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._index.scan()
        self._waiting: OrderedDict[Key, SavedState] = OrderedDict()
        """States to write, the oldest first."""
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

    def lengths(self) -> frozenset[int]:
        """Returns the lengths, in tokens, of the saved states; none while the disk hangs."""
        started = self._busy_since
        hangs = started is not None and time.monotonic() - started > READ_SECONDS
        return frozenset() if hangs else self._index.lengths

    def has(self, key: Key) -> bool:
        return self._index.has(key) and time.monotonic() >= self._retry_at.get(key, 0.0)

    def has_logits(self, key: Key) -> bool | None:
        return self._index.has_logits(key)

    def save(self, key: Key, state: State, logits: np.ndarray | None) -> None:
        """Queues a state to be written unless it is saved; a full queue loses its oldest."""
        if self.has(key) and (logits is None or self.has_logits(key)):
            return
        saved = SavedState(self._identity, key, state, logits=logits, artifact=self._artifact)
        most = max(_MIN_WAITING, self._max_waiting_bytes // state_bytes(state, logits))
        with self._changed:
            queued = self._waiting.get(key)
            if self._closed or (queued and queued.logits is not None and logits is None):
                return
            self._waiting[key] = saved
            while len(self._waiting) > most:
                self._waiting.popitem(last=False)
            self._changed.notify()

    def fetch(self, keys: Sequence[Key], length: int, callback: Callable[[], None]) -> Fetch:
        """Queues a read unless it is queued; `callback` is called at its end."""
        with self._changed:
            fetch = self._fetches.setdefault(keys[0], Fetch(keys, length))
            self._changed.notify()
        fetch.found.add_done_callback(lambda _: callback())
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
                    return partial(self._write, *self._waiting.popitem(last=False))
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
        fetch.found.set_result(state)

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
