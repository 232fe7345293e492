"""Reads many texts; a prefix that several of them share is read once.

The sorted texts form a tree: each branch continues from the state after a shared prefix. Branches
with a single text are grouped by length into batches.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rgexport.evaluate.losses import nats
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

_SHORTEST_PREFIX = 8
"""Fewest tokens of a shared prefix that is read once; each branch reads a shorter one again."""
_ROWS = 16
"""Most texts of a batch."""
_STATE_BYTES, _LOGITS_BYTES = 256 << 20, 128 << 20
"""Most bytes of the states of a batch, and of the logits of one call."""


Ids = tuple[int, ...]


class PrefixReader(ABC):
    """Takes different texts through a session; a subclass receives the requested logits.

    `texts` are sorted, so that those with a common prefix are neighbours; methods identify a text
    by its index there. `read` counts the tokens that the session took.
    """

    def __init__(self, session: Session, scored: Mapping[Ids, int]):
        """Takes ids → how many of their last positions have requested logits."""
        self.session, self.read = session, 0
        self.texts = sorted(scored)
        self.first_scored = [len(ids) - scored[ids] for ids in self.texts]

    @property
    def rows(self) -> int:
        return max(1, min(_ROWS, _STATE_BYTES // max(1, self.session.info.state_bytes)))

    def run(self) -> None:
        """Reads all texts; the session's state afterwards is undefined."""
        self.session.reset()
        if self.texts:
            self._read_from(range(len(self.texts)), 0, self.session.get_state())

    @abstractmethod
    def on_logits(self, index: int, logits: np.ndarray) -> None:
        """Receives the next requested logits [n, vocab] of a text."""

    @abstractmethod
    def on_end(self, indices: Sequence[int]) -> None:
        """Handles the end of texts that the session's rows have just read; may change the state."""

    def _read_from(self, indices: Sequence[int], start: int, state: State) -> None:
        """Reads the rest of texts that share their first `start` tokens and the state there."""
        by_length = defaultdict(list)
        for branch in self._branches(indices, start):
            if len(branch) == 1:
                by_length[len(self.texts[branch[0]])].append(branch[0])
                continue
            self.session.set_state(state)
            stop = self._common(branch)
            self._take([branch], start, stop)
            after = self.session.get_state()
            if len(self.texts[branch[0]]) == stop:
                self.on_end(branch[:1])
                branch = branch[1:]
            self._read_from(branch, stop, after)
        for stop, single in by_length.items():
            for first in range(0, len(single), self.rows):
                batch = single[first : first + self.rows]
                self.session.set_state({n: a.repeat(len(batch), 0) for n, a in state.items()})
                self._take([[index] for index in batch], start, stop)
                self.on_end(batch)

    def _branches(self, indices: Sequence[int], start: int) -> Iterator[Sequence[int]]:
        """Splits texts into groups with a long common prefix, and single texts."""
        common = self._common(indices)
        if len(indices) == 1 or common - start >= _SHORTEST_PREFIX:
            yield indices
            return
        for _, group in groupby(indices, lambda index: self.texts[index][common : common + 1]):
            yield from self._branches(list(group), start)

    def _common(self, indices: Sequence[int]) -> int:
        first, last = self.texts[indices[0]], self.texts[indices[-1]]
        pairs = enumerate(zip(first, last, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(first), len(last)))

    def _take(self, rows: Sequence[Sequence[int]], start: int, stop: int) -> None:
        """Takes tokens `start` to `stop`; each row stands for texts that share these tokens."""
        tokens = np.array([self.texts[row[0]][start:stop] for row in rows], np.int64)
        first = min(self.first_scored[index] for row in rows for index in row)
        first = min(stop, max(start, first))
        most = max(1, _LOGITS_BYTES // (4 * self.session.vocab_size * len(rows)))
        position = start
        while position < stop:
            begin = max(first, position)
            end = min(begin + most, stop)
            chunk = tokens[:, position - start : end - start]
            logits = self.session.prefill(chunk, end - begin)
            self.read += chunk.size
            logits = logits[:, logits.shape[1] - (end - begin) :]
            for indices, row in zip(rows, logits, strict=True):
                for index in indices:
                    if len(requested := row[max(0, self.first_scored[index] - begin) :]):
                        self.on_logits(index, requested)
            position = end


@dataclass(frozen=True)
class ScoredText:
    """The ids that a model reads, and the targets it should predict, the last one after `ids`."""

    ids: Ids
    targets: Ids


class Likelihoods(PrefixReader):
    """Reads texts and scores their targets, if any: `nats` [n], and bool `likeliest` [n]."""

    def __init__(self, session: Session, scored: Sequence[ScoredText]):
        self._targets = [np.array(text.targets, np.int64) for text in scored]
        self._by_ids = defaultdict(list)
        for index, text in enumerate(scored):
            if text.targets:
                self._by_ids[text.ids].append(index)
        self.nats, self.likeliest = np.zeros(len(scored)), np.ones(len(scored), bool)
        counts = {
            ids: max(len(self._targets[index]) for index in indices)
            for ids, indices in self._by_ids.items()
        }
        super().__init__(session, counts)
        self._next = self.first_scored.copy()

    def on_logits(self, index: int, logits: np.ndarray) -> None:
        ids, start = self.texts[index], self._next[index]
        stop = self._next[index] = start + len(logits)
        for scored in self._by_ids[ids]:
            first = len(ids) - len(self._targets[scored])
            rows = logits[max(0, first - start) :]
            if not len(rows):
                continue
            targets = self._targets[scored][stop - len(rows) - first : stop - first]
            self.nats[scored] += nats(rows[None], targets[None]).sum()
            self.likeliest[scored] &= bool((rows.argmax(-1) == targets).all())

    def on_end(self, indices: Sequence[int]) -> None:
        return  # all targets are scored already
