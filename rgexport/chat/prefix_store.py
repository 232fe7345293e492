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
        return state_bytes(self.state, self.logits)


class PrefixStore:
    """The states of a process, within a limit of memory, found only in their namespaces."""

    def __init__(self, max_bytes: int, folder: StateFolder | None = None) -> None:
        self._max_bytes, self._folder = max_bytes, folder
        self._entries: OrderedDict[Key, Prefix] = OrderedDict()
        self.nbytes = 0
        self._lock = threading.Lock()

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
        with self._lock:
            if before := self._entries.pop(in_namespace(key_of(ids), namespace), None):
                self.nbytes -= before.nbytes

    def fetch(
        self, ids: Sequence[int], callback: Callable[[], None], namespace: str = ""
    ) -> Fetch | None:
        """Lets the folder read a longer prefix than memory has, and call `callback` at the end."""
        if self._folder is None:
            return None
        keys = self._keys(ids, namespace, self._folder.lengths())
        with self._lock:
            known = next((key[0] for key in keys if self._continues(key, len(ids))), 0)
        better = [key for key in keys if key[0] > known and self._folder.has(key)]
        if better and better[0][0] == len(ids) and self._folder.has_logits(better[0]) is False:
            del better[0]
        return self._folder.fetch(better, len(ids), callback) if better else None

    def longest(
        self, ids: Sequence[int], namespace: str = "", fetch: Fetch | None = None
    ) -> Prefix | None:
        if fetch and (saved := fetch.state):
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
        for key in self._keys(ids, namespace, folder.lengths() if folder else ()):
            with self._lock:
                if self._continues(key, len(ids)):
                    return key[0]
            if folder and folder.has(key) and (key[0] < len(ids) or folder.has_logits(key)):
                return key[0]
        return 0

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def close(self) -> None:
        if self._folder:
            self._folder.close()

    def _keys(self, ids: Sequence[int], namespace: str, lengths: Iterable[int] = ()) -> list[Key]:
        with self._lock:
            all_lengths = {*lengths, *(length for length, _ in self._entries)}
        keys = keys_of(ids, sorted(length for length in all_lengths if length <= len(ids)))
        return [in_namespace(key, namespace) for key in reversed(keys)]

    def _continues(self, key: Key, count: int) -> bool:
        """Returns whether memory has a state with an unseen token or logits; the lock is held."""
        prefix = self._entries.get(key)
        return prefix is not None and (prefix.length < count or prefix.logits is not None)

    def _remember(self, key: Key, prefix: Prefix) -> Prefix:
        """Stores a prefix, or leaves the stored one if only that has logits; returns which."""
        with self._lock:
            if before := self._entries.pop(key, None):
                self.nbytes -= before.nbytes
                if prefix.logits is None and before.logits is not None:
                    prefix = prefix if before.foreign and not prefix.foreign else before
            self._entries[key] = prefix
            self.nbytes += prefix.nbytes
            while self.nbytes > self._max_bytes and len(self._entries) > 1:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes
        return prefix
