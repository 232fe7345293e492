"""States by the tokens that led to them: a conversation goes on where its prefix was known.

The key is a hash of the tokens, so a state is found only by exactly these tokens. Least recently
used states go first. With a folder, states are also written there, and found again after a restart.
"""

import contextlib
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.chat.prefix_key import Key, in_namespace, key_of, keys_of
from rgexport.chat.state_file import SavedState, read_state, write_state
from rgexport.errors import RequestError
from rgexport.export.identity import Identity
from rgexport.griffin.state import State
from rgexport.progress import warn

_FILE = re.compile(r"(\d+)-([0-9a-f]{64})\.state")


@dataclass(frozen=True)
class Prefix:
    """A state of batch 1 that has seen `length` tokens; perhaps the logits [vocab] of the last."""

    length: int
    state: State
    logits: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        arrays = [*self.state.values(), *([] if self.logits is None else [self.logits])]
        return sum(array.nbytes for array in arrays)


class StateFolder:
    """Files of states of one model, written by a thread of its own.

    They have a hash of the text that was read, not the text. A file appears complete or not at
    all, so the folder is whole after a kill, and several processes may use it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        shapes: dict[str, tuple[int, ...]],
        *,
        max_bytes: int,
        precision: str | None = None,
    ) -> None:
        """Opens the folder, which is made if it is missing.

        Raises:
            RequestError: it cannot be made.
        """
        self._folder = folder / f"{identity.weights[:16]}-{identity.window}"
        self._identity, self._shapes = identity, shapes
        self._max_bytes, self._precision = max_bytes, precision
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_halves()
        except OSError as error:
            raise RequestError(f"cannot make {self._folder}: {error.strerror}") from None
        self._found: tuple[int, set[Key]] = (0, set())
        self._bad: set[Key] = set()
        self._waiting: queue.Queue[tuple[Key, SavedState] | None] = queue.Queue(_WAITING)
        self._writer = threading.Thread(target=self._write, name="state writer", daemon=True)
        self._writer.start()

    @property
    def keys(self) -> set[Key]:
        """What can be loaded, also of what other processes have saved."""
        with contextlib.suppress(OSError):  # somebody has removed the folder
            changed = self._folder.stat().st_mtime_ns
            if changed != self._found[0]:
                names = (_key_of(path) for path in self._folder.iterdir())
                self._found = changed, {key for key in names if key}
        return self._found[1] - self._bad

    def save(self, key: Key, state: State) -> None:
        """Lets the thread write a state; waits if it is far behind."""
        if key not in self._found[1] or key in self._bad:
            self._waiting.put((key, SavedState(self._identity, key, state)))

    def load(self, key: Key) -> State | None:
        """A state; None, with a warning, if its file is gone or damaged."""
        path = self._path(key)
        try:
            saved = read_state(path, self._shapes)
            os.utime(path)
        except (OSError, RequestError) as error:
            warn(f"a saved state is not used: {error}")
            self._bad.add(key)
            return None
        return saved.state if key == saved.key else None

    def close(self) -> None:
        """Waits until everything is written."""
        self._waiting.put(None)
        self._writer.join()

    def _path(self, key: Key) -> Path:
        return self._folder / f"{key[0]}-{key[1]}.state"

    def _remove_halves(self) -> None:
        """Removes what killed processes left, but not what others are writing."""
        for left in self._folder.glob(".*.partial-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _WRITING_SECONDS:
                    left.unlink()

    def _write(self) -> None:
        while (work := self._waiting.get()) is not None:
            key, saved = work
            try:
                write_state(self._path(key), saved, precision=self._precision)
                self._bad.discard(key)
                self._trim()
            except RequestError as error:
                warn(f"a state was not saved: {error}")

    def _trim(self) -> None:
        """Removes the files that were not used for longest."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        excess = sum(size for _, size, _ in found) - self._max_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size


_WRITING_SECONDS = 60
"""How long a file may take to be written."""
_WAITING = 4
"""States that wait to be written: each takes memory beside the store's."""


class PrefixStore:
    """The states of a process, in at most so many bytes of memory.

    A state is found only in the namespace that it was put into; "" is that of a single user.
    """

    def __init__(self, max_bytes: int, folder: StateFolder | None = None) -> None:
        """Begins empty, but for what the folder has."""
        self._max_bytes, self._folder = max_bytes, folder
        self._entries: OrderedDict[Key, Prefix] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory that is in use."""
        return self._nbytes

    def put(
        self,
        ids: Sequence[int],
        state: State,
        logits: np.ndarray | None = None,
        *,
        lasting: bool = True,
        namespace: str = "",
    ) -> None:
        """Keeps the state after `ids`; in the folder, too, if it is `lasting`."""
        self.add(key_of(ids), state, logits, lasting=lasting, namespace=namespace)

    def add(
        self,
        key: Key,
        state: State,
        logits: np.ndarray | None = None,
        *,
        lasting: bool = True,
        namespace: str = "",
    ) -> None:
        """As `put`, for tokens of which only the key is known."""
        key = in_namespace(key, namespace)
        self._remember(key, Prefix(key[0], state, logits))
        if self._folder and lasting:
            self._folder.save(key, state)

    def forget(self, ids: Sequence[int], namespace: str = "") -> None:
        """Frees the memory of the state after `ids`."""
        with self._lock:
            if before := self._entries.pop(in_namespace(key_of(ids), namespace), None):
                self._nbytes -= before.nbytes

    def longest(self, ids: Sequence[int], namespace: str = "") -> Prefix | None:
        """The state of the longest prefix that is known and can be continued.

        A state of all tokens can be if it has logits; else a token must be left to be read.
        """
        for key in self._known(ids, namespace):
            found = self._get(key)
            if found and (found.length < len(ids) or found.logits is not None):
                return found
        return None

    def length(self, ids: Sequence[int], namespace: str = "") -> int:
        """The tokens of the longest prefix that is known; nothing is loaded."""
        return next((key[0] for key in self._known(ids, namespace)), 0)

    def clear(self) -> None:
        """Forgets what is in memory."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def close(self) -> None:
        """Waits until the folder is written."""
        if self._folder:
            self._folder.close()

    def _known(self, ids: Sequence[int], namespace: str) -> list[Key]:
        """The keys of known prefixes, the longest first."""
        with self._lock:
            known = {*self._entries, *(self._folder.keys if self._folder else ())}
        lengths = sorted({length for length, _ in known if length <= len(ids)})
        keys = (in_namespace(key, namespace) for key in keys_of(ids, lengths))
        return [key for key in keys if key in known][::-1]

    def _get(self, key: Key) -> Prefix | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        state = self._folder.load(key) if self._folder else None
        if state is None:
            return None
        found = Prefix(key[0], state, None)
        self._remember(key, found)
        return found

    def _remember(self, key: Key, prefix: Prefix) -> None:
        with self._lock:
            if before := self._entries.pop(key, None):
                self._nbytes -= before.nbytes
            self._entries[key] = prefix
            self._nbytes += prefix.nbytes
            while self._nbytes > self._max_bytes and len(self._entries) > 1:
                self._nbytes -= self._entries.popitem(last=False)[1].nbytes


def _key_of(path: Path) -> Key | None:
    match = _FILE.fullmatch(path.name)
    return (int(match[1]), match[2]) if match else None
