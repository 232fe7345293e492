"""A cache of states by the tokens before them, so that a prompt goes on from a known prefix."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.chat.state_file import Key, in_namespace, key_of, keys_of, state_bytes
from rgexport.chat.state_folder import Fetch, StateFolder
from rgexport.griffin.state import State


@dataclass(frozen=True)
class Prefix:
    """A state of batch 1 that has seen `length` tokens, and the logits [vocab] after the last one.

    It is `foreign` if another artifact has computed it, or a state that it follows from.
    """

    length: int
    state: State
    logits: np.ndarray | None
    foreign: bool = False

    @property
    def nbytes(self) -> int:
        """The size of the arrays in bytes."""
        return state_bytes(self.state, self.logits)


class PrefixStore:
    """The states of a process, within a limit of memory, found only in their namespaces.

    Any thread may call any method. The arrays of a state are shared, so nobody may change them.
    """

    def __init__(self, max_bytes: int, folder: StateFolder | None = None) -> None:
        self._max_bytes = max_bytes
        self._folder = folder
        self._entries: OrderedDict[Key, Prefix] = OrderedDict()
        """Key → the state, the least recently used first."""
        self.nbytes = 0
        """Bytes of all states in memory."""
        self._lock = threading.Lock()
        """Guards `_entries` and changes of `nbytes`."""

    def put(
        self,
        key: Key,
        state: State,
        logits: np.ndarray | None = None,
        *,
        lasting: bool = True,
        foreign: bool = False,
        namespace: str = "",
    ) -> None:
        """Stores a state; also in the folder, if it is `lasting` and not `foreign`."""
        key = in_namespace(key, namespace)
        prefix = self._remember(key, Prefix(key[0], state, logits, foreign))
        if self._folder and lasting and not prefix.foreign:
            self._folder.save(key, prefix.state, prefix.logits)

    def forget(self, ids: Sequence[int], namespace: str = "") -> None:
        """Removes the state after these tokens from memory."""
        key = in_namespace(key_of(ids), namespace)
        with self._lock:
            self._remove(key)

    def fetch(
        self, ids: Sequence[int], callback: Callable[[], None], namespace: str = ""
    ) -> Fetch | None:
        """Lets the folder read a longer prefix than memory has, and call `callback` at the end."""
        if self._folder is None:
            return None
        keys = self._keys(ids, namespace, self._folder.lengths())
        known = self._known_length(keys, len(ids))
        better = [key for key in keys if key[0] > known and self._folder.has(key)]
        # A state after the whole prompt can only be continued with its logits.
        if better and better[0][0] == len(ids) and self._folder.has_logits(better[0]) is False:
            del better[0]
        if not better:
            return None
        return self._folder.fetch(better, len(ids), callback)

    def longest(
        self, ids: Sequence[int], namespace: str = "", fetch: Fetch | None = None
    ) -> Prefix | None:
        """Returns the longest prefix in memory that can be continued, with that of `fetch`."""
        saved = fetch.state if fetch else None
        if saved:
            self._remember(saved.key, Prefix(saved.position, saved.state, saved.logits))
        for key in self._keys(ids, namespace):
            with self._lock:
                if self._continues(key, len(ids)):
                    self._entries.move_to_end(key)
                    return self._entries[key]
        return None

    def length(self, ids: Sequence[int], namespace: str = "") -> int:
        """Returns the length of the longest prefix that can be continued; reads no file."""
        folder = self._folder
        saved_lengths = folder.lengths() if folder else ()
        for key in self._keys(ids, namespace, saved_lengths):
            with self._lock:
                if self._continues(key, len(ids)):
                    return key[0]
            if folder and folder.has(key) and (key[0] < len(ids) or folder.has_logits(key)):
                return key[0]
        return 0

    def clear(self) -> None:
        """Removes all states from memory."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def close(self) -> None:
        """Closes the folder, which writes the queued states."""
        if self._folder:
            self._folder.close()

    def _keys(self, ids: Sequence[int], namespace: str, lengths: Iterable[int] = ()) -> list[Key]:
        """Returns the keys of prefixes of the lengths in memory and of `lengths`, longest first."""
        with self._lock:
            all_lengths = {length for length, _ in self._entries}
        all_lengths.update(lengths)
        fitting = sorted(length for length in all_lengths if length <= len(ids))
        keys = keys_of(ids, fitting)
        return [in_namespace(key, namespace) for key in reversed(keys)]

    def _known_length(self, keys: Sequence[Key], count: int) -> int:
        """Returns the length of the first key whose state memory has, for `count` tokens."""
        with self._lock:
            return next((key[0] for key in keys if self._continues(key, count)), 0)

    def _continues(self, key: Key, count: int) -> bool:
        """Returns whether memory has a state with an unseen token or logits; the lock is held."""
        prefix = self._entries.get(key)
        return prefix is not None and (prefix.length < count or prefix.logits is not None)

    def _remember(self, key: Key, prefix: Prefix) -> Prefix:
        """Stores a prefix, or leaves the stored one if only that has logits; returns which."""
        with self._lock:
            before = self._remove(key)
            if before and before.logits is not None and prefix.logits is None:
                replaces_foreign = before.foreign and not prefix.foreign
                if not replaces_foreign:
                    prefix = before
            self._entries[key] = prefix
            self.nbytes += prefix.nbytes

            while self.nbytes > self._max_bytes and len(self._entries) > 1:
                oldest = next(iter(self._entries))
                self._remove(oldest)
        return prefix

    def _remove(self, key: Key) -> Prefix | None:
        """Removes a state from memory and returns it, if there is one; the lock is held."""
        prefix = self._entries.pop(key, None)
        if prefix:
            self.nbytes -= prefix.nbytes
        return prefix
