"""A folder of states for the next start, read and written by its own thread.

Disks fill up, fail, hang and recover. No other thread waits for this one: it reads ahead, the queue
of unwritten states is limited, and after a failure it retries later.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rgexport.chat.folder_index import FolderIndex, file_name
from rgexport.chat.prefix_key import Key
from rgexport.chat.state_file import SavedState, read_state, write_state
from rgexport.errors import RequestError, system_error
from rgexport.export.identity import Identity
from rgexport.griffin.state import State
from rgexport.progress import warn

BACK_OFF_SECONDS = 1.0, 60.0
"""Time without writing after a first failure, and longest time after repeated ones."""
READ_SECONDS = 5.0
"""Longest time that a request waits for a state; then it reads its prompt instead."""
CLOSE_SECONDS = 10.0
_AVOID_SECONDS = 60.0
"""Time before a file is tried again that the system could not read."""
_WARN_AGAIN_SECONDS = 600.0
_SCAN_SECONDS, _SCAN_FACTOR = 1.0, 20
"""Shortest time between scans for files of other processes, also as a multiple of a scan's time."""
_LEAST_WAITING = 4
"""Number of states that may always wait to be written, however large."""
_OVERHEAD_BYTES = 4096
"""Memory of a waiting state beside its arrays."""


class Fetch:
    """A state that the folder's thread reads.

    Attributes:
        keys: the keys that may be used, the best first.
        count: length of the text; a state of all its tokens needs logits.
        state: the state, once it was read.
        then: called when the reading has ended.
    """

    def __init__(self, keys: Sequence[Key], count: int) -> None:
        self.keys, self.count = keys, count
        self.state: SavedState | None = None
        self.then: list[Callable[[], None]] = []
        self._deadline = time.monotonic() + READ_SECONDS
        self._ended = threading.Event()

    @property
    def pending(self) -> bool:
        """Whether the request should still wait for it."""
        return not self._ended.is_set() and time.monotonic() < self._deadline

    def wait(self) -> None:
        self._ended.wait(max(0.0, self._deadline - time.monotonic()))

    def end(self, state: SavedState | None) -> None:
        """Takes the state; only for the folder's thread."""
        self.state = state
        self._ended.set()
        for call in self.then:
            call()


class StateFolder:
    """Files of states that one artifact has computed.

    They have a hash of the text, not the text. A file appears complete or not at all, so the folder
    is whole after a kill, and several processes may use it.
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
        """Opens the folder, and makes it if it is missing.

        Args:
            root: the folder; each artifact has one in it.
            identity: the model.
            shapes: the shapes of its states.
            artifact: a hash of what computes the states; only equal ones are used.
            vocab_size: number of logits.
            max_bytes: maximum size of the files of all artifacts.
            waiting_bytes: maximum memory of states that wait to be written.
            precision: precision of the files, see `write_state`.

        Raises:
            RequestError: it cannot be made or listed.
        """
        name = f"{identity.weights[:16]}-{identity.window}-{artifact[:16]}"
        self._folder, self._index = root / name, FolderIndex(root, name)
        self._identity, self._shapes, self._artifact = identity, shapes, artifact
        self._vocab_size, self._precision = vocab_size, precision
        self._max_bytes, self._most_waiting_bytes = max_bytes, waiting_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._index.scan()
        except OSError as error:
            raise RequestError(f"cannot use {self._folder}: {error.strerror}") from None
        self._waiting: OrderedDict[Key, SavedState] = OrderedDict()
        self._waiting_nbytes = 0
        self._fetches: OrderedDict[Key, Fetch] = OrderedDict()
        self._avoided: dict[Key, float] = {}
        """Key of an unreadable file → when to try it again."""
        self._warned: dict[tuple[str, object], float] = {}
        self._busy_since: float | None = None
        self._back_off, self._write_at, self._scan_at = 0.0, 0.0, 0.0
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="state folder", daemon=True)
        self._thread.start()

    def lengths(self) -> set[int]:
        """Returns the lengths, in tokens, of readable states; none while the disk hangs."""
        since = self._busy_since
        hangs = since is not None and time.monotonic() - since > READ_SECONDS
        return set() if hangs else self._index.lengths()

    def has(self, key: Key) -> bool:
        return self._index.has(key) and time.monotonic() >= self._avoided.get(key, 0.0)

    def has_logits(self, key: Key) -> bool | None:
        return self._index.has_logits(key)

    def save(self, key: Key, state: State, logits: np.ndarray | None) -> None:
        """Queues a state to be written; the oldest ones are dropped if the queue is too large."""
        if self.has(key) and (logits is None or self.has_logits(key)):
            return
        with self._changed:
            before = self._waiting.get(key)
            if self._closed or (before and before.logits is not None and logits is None):
                return
            saved = SavedState(self._identity, key, state, logits=logits, artifact=self._artifact)
            if before:
                self._take_waiting(key)
            self._waiting[key] = saved
            self._waiting_nbytes += _nbytes(saved)
            while (
                len(self._waiting) > _LEAST_WAITING
                and self._waiting_nbytes > self._most_waiting_bytes
            ):
                self._take_waiting(next(iter(self._waiting)))
            self._changed.notify()

    def fetch(self, keys: Sequence[Key], count: int, then: Callable[[], None]) -> Fetch:
        """Queues the reading of the first usable state, see `Fetch`."""
        with self._changed:
            fetch = self._fetches.setdefault(keys[0], Fetch(keys, count))
            fetch.then.append(then)
            self._changed.notify()
        return fetch

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Waits until everything is written, at most `seconds`."""
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
        """Waits for the next reading, writing or scan; returns None at the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                if self._fetches:
                    return partial(self._read, next(iter(self._fetches.values())))
                if self._waiting and (self._closed or now >= self._write_at):
                    key = next(iter(self._waiting))
                    return partial(self._write, key, self._take_waiting(key))
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
            if state and (key[0] < fetch.count or state.logits is not None):
                break
        with self._changed:
            del self._fetches[fetch.keys[0]]
        fetch.end(state)

    def _load(self, key: Key) -> SavedState | None:
        """Reads a state; warns and returns None if its file is missing, damaged or foreign."""
        path = self._folder / file_name(key)
        try:
            try:
                os.utime(path)
            except FileNotFoundError:
                raise
            except OSError:
                pass  # a read-only disk can still be read
            saved = read_state(path, self._shapes)
        except FileNotFoundError:
            self._index.discard(key)
            return None
        except Exception as error:  # whatever a file does, the thread goes on
            is_transient = system_error(error) is not None
            self._avoid(key, _AVOID_SECONDS if is_transient else float("inf"))
            self._warn("a saved state is not used", error)
            return None
        logits = saved.logits
        has_vocab_size = logits is None or logits.shape == (self._vocab_size,)
        if not has_vocab_size or (saved.key, saved.artifact) != (key, self._artifact):
            self._avoid(key, float("inf"))
            return None
        self._index.touch(key, has_logits=logits is not None)
        return saved

    def _write(self, key: Key, saved: SavedState) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / file_name(key)
            nbytes = write_state(path, saved, precision=self._precision)
            self._index.add(key, nbytes, has_logits=saved.logits is not None)
            self._avoided.pop(key, None)
            self._index.trim(self._max_bytes)
            self._back_off = 0.0
        except Exception as error:
            first, most = BACK_OFF_SECONDS
            self._back_off = min(max(first, 2 * self._back_off), most)
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

    def _avoid(self, key: Key, seconds: float) -> None:
        now = time.monotonic()
        self._avoided = {k: until for k, until in self._avoided.items() if until > now}
        self._avoided[key] = now + seconds

    def _warn(self, what: str, error: Exception) -> None:
        """Warns once of a kind of failure, and again if it persists."""
        system = system_error(error)
        kind, now = (what, system.errno if system else type(error)), time.monotonic()
        if now - self._warned.get(kind, -_WARN_AGAIN_SECONDS) >= _WARN_AGAIN_SECONDS:
            self._warned[kind] = now
            warn(f"{what}: {error}")

    def _take_waiting(self, key: Key) -> SavedState:
        saved = self._waiting.pop(key)
        self._waiting_nbytes -= _nbytes(saved)
        return saved


def _nbytes(saved: SavedState) -> int:
    arrays = [*saved.state.values(), *([] if saved.logits is None else [saved.logits])]
    return sum(array.nbytes for array in arrays) + _OVERHEAD_BYTES
