"""The folder in which states of the model are saved, so that a later process can continue them.

One thread reads and writes all files, because disks fill up, fail, hang and recover. Other threads
only queue reads and writes, and a request waits at most `READ_SECONDS` for a read. The queue of
unwritten states is limited. After a failure, writing pauses for a while.
"""

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from rgexport.artifacts.manifest import Identity
from rgexport.chat.folder_index import FolderIndex
from rgexport.chat.state_file import Key, SavedState, read_state, state_bytes, write_state
from rgexport.errors import system_error
from rgexport.files.paths import report_os_errors
from rgexport.griffin.state import State
from rgexport.progress import warn

READ_SECONDS = 5.0
"""Longest time that a request waits for a state; then the model reads its prompt instead."""

CLOSE_SECONDS = 10.0
"""Longest time that `close` waits for states to be written."""

_FIRST_BACK_OFF_SECONDS = 1.0
"""Pause of writing after a first failure; each further failure doubles it."""

_LONGEST_BACK_OFF_SECONDS = 60.0
"""Longest pause of writing after failures."""

_RETRY_SECONDS = 60.0
"""Time until a file is tried again after the system could not read it."""

_WARN_AGAIN_SECONDS = 600.0
"""Time until a failure of the same kind is reported again."""

_SCAN_SECONDS = 1.0
"""Shortest pause between scans for files of other processes."""

_SCAN_FACTOR = 20
"""Shortest pause between scans, in times of the last scan: slow disks are scanned rarely."""

_MIN_WAITING = 4
"""Number of states that may wait to be written whatever their size."""


class Fetch:
    """A queued or finished read of a saved state from which `length` tokens can be continued.

    It reads the first usable one of `keys`, the best first. The folder's thread sets `saved`; any
    thread may read the properties.
    """

    def __init__(self, keys: Sequence[Key], length: int) -> None:
        self.keys = keys
        self.length = length
        self.saved = Future[SavedState | None]()
        self._deadline = time.monotonic() + READ_SECONDS

    @property
    def pending(self) -> bool:
        """Whether a request should still wait for it."""
        return not self.saved.done() and time.monotonic() < self._deadline

    @property
    def state(self) -> SavedState | None:
        """The state, if it was read by now."""
        return self.saved.result() if self.saved.done() else None


class StateFolder:
    """A cache on disk: key of a prefix → the state that one artifact computed, one file per state.

    Files have a hash of the text instead of the text. They are written atomically, so a killed
    process leaves the folder intact, and several processes may use it. Any thread may call the
    public methods; the private ones run in the folder's own thread.
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
        self._folder = root / name
        self._index = FolderIndex(root, name)
        self._identity = identity
        self._shapes = shapes
        self._artifact = artifact
        self._vocab_size = vocab_size
        self._precision = precision
        self._max_bytes = max_bytes
        self._max_waiting_bytes = waiting_bytes
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
        """Time at which the current read, write or scan began."""
        self._back_off = 0.0
        self._write_at = 0.0
        self._scan_at = 0.0
        self._closed = False
        self._changed = threading.Condition()
        """Guards `_waiting`, `_fetches` and `_closed`, and wakes the folder's thread."""
        self._thread = threading.Thread(target=self._run, name="state folder", daemon=True)
        self._thread.start()

    def lengths(self) -> frozenset[int]:
        """Returns the lengths, in tokens, of the saved states; none while the disk hangs."""
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > READ_SECONDS:
            return frozenset()
        return self._index.lengths

    def has(self, key: Key) -> bool:
        """Returns whether there is a file of the state, which may be tried now."""
        return self._index.has(key) and time.monotonic() >= self._retry_at.get(key, 0.0)

    def has_logits(self, key: Key) -> bool | None:
        """Returns whether the saved state has logits; None if only its file knows."""
        return self._index.has_logits(key)

    def save(self, key: Key, state: State, logits: np.ndarray | None) -> None:
        """Queues a state to be written unless it is saved; a full queue loses its oldest."""
        if self.has(key) and (logits is None or self.has_logits(key)):
            return
        saved = SavedState(self._identity, key, state, logits=logits, artifact=self._artifact)
        fitting = self._max_waiting_bytes // state_bytes(state, logits)
        max_waiting = max(_MIN_WAITING, fitting)
        with self._changed:
            if self._closed:
                return
            queued = self._waiting.get(key)
            if queued and queued.logits is not None and logits is None:
                return
            self._waiting[key] = saved
            while len(self._waiting) > max_waiting:
                self._waiting.popitem(last=False)
            self._changed.notify()

    def fetch(self, keys: Sequence[Key], length: int, callback: Callable[[], None]) -> Fetch:
        """Queues a read unless it is queued; `callback` is called at its end."""
        with self._changed:
            fetch = self._fetches.setdefault(keys[0], Fetch(keys, length))
            self._changed.notify()

        def call_back(_: Future[SavedState | None]) -> None:
            callback()

        fetch.saved.add_done_callback(call_back)
        return fetch

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Writes the queued states, at most so many seconds, and ends the thread."""
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
                    oldest = next(iter(self._fetches.values()))
                    return partial(self._read, oldest)
                if self._waiting and (self._closed or now >= self._write_at):
                    key, saved = self._waiting.popitem(last=False)
                    return partial(self._write, key, saved)
                if self._closed:
                    return None
                if now >= self._scan_at:
                    return self._scan
                due = self._scan_at
                if self._waiting:
                    due = min(due, self._write_at)
                self._changed.wait(due - now)

    def _read(self, fetch: Fetch) -> None:
        """Reads the files of a fetch until one can be continued."""
        saved = None
        for key in fetch.keys:
            saved = self._load(key)
            if saved and (key[0] < fetch.length or saved.logits is not None):
                break
        with self._changed:
            del self._fetches[fetch.keys[0]]
        fetch.saved.set_result(saved)

    def _load(self, key: Key) -> SavedState | None:
        """Returns a saved state; None if its file cannot be used, which is remembered."""
        try:
            with suppress(OSError):  # the disk may be read-only
                os.utime(self._path(key))  # marks the file as recently used
            saved = read_state(self._path(key), self._shapes)
        except Exception as error:  # no file may end the thread
            self._remember_failed_read(key, error)
            return None
        if not self._is_usable(key, saved):
            self._retry_at[key] = math.inf
            return None
        self._index.touch(key, has_logits=saved.logits is not None)
        return saved

    def _remember_failed_read(self, key: Key, error: Exception) -> None:
        cause = system_error(error)
        if isinstance(cause, FileNotFoundError):
            self._index.discard(key)
            return
        delay = _RETRY_SECONDS if cause else math.inf
        self._retry_at[key] = time.monotonic() + delay
        self._warn("a saved state is not used", error)

    def _is_usable(self, key: Key, saved: SavedState) -> bool:
        """Returns whether a file has the state of its name, by this artifact."""
        logits = saved.logits
        if logits is not None and logits.shape != (self._vocab_size,):
            return False
        return saved.key == key and saved.artifact == self._artifact

    def _path(self, key: Key) -> Path:
        _, name = self._index.name_of(key)
        return self._folder / name

    def _write(self, key: Key, saved: SavedState) -> None:
        """Writes a state and trims the folder; a failure pauses writing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            nbytes = write_state(self._path(key), saved, precision=self._precision)
            self._index.add(key, nbytes, has_logits=saved.logits is not None)
            self._retry_at.pop(key, None)
            self._index.trim(self._max_bytes)
            self._back_off = 0.0
        except Exception as error:
            doubled = max(_FIRST_BACK_OFF_SECONDS, 2 * self._back_off)
            self._back_off = min(doubled, _LONGEST_BACK_OFF_SECONDS)
            self._write_at = time.monotonic() + self._back_off
            self._warn("states are not saved at the moment", error)

    def _scan(self) -> None:
        """Looks for files of other processes, and forgets failures that are over."""
        began = time.monotonic()
        try:
            self._index.scan()
        except Exception as error:
            self._warn("states of other processes are not seen at the moment", error)
        now = time.monotonic()
        self._scan_at = now + max(_SCAN_SECONDS, _SCAN_FACTOR * (now - began))
        self._retry_at = {key: at for key, at in self._retry_at.items() if at > now}

    def _warn(self, what: str, error: Exception) -> None:
        """Reports a failure, unless one of its kind was reported lately."""
        cause = system_error(error)
        kind = (what, cause.errno if cause else type(error))
        now = time.monotonic()
        last_warning = self._warned.get(kind, -_WARN_AGAIN_SECONDS)
        if now - last_warning >= _WARN_AGAIN_SECONDS:
            self._warned[kind] = now
            warn(f"{what}: {error}")
