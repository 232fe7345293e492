"""Reads many texts; a prefix that several of them share is read once.

The sorted texts form a tree: each branch continues from the state after a shared prefix. Branches
with a single text are grouped by length into batches.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from rgexport.evaluation.losses import nats
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

_SHORTEST_PREFIX = 8
"""Fewest tokens of a shared prefix that is read once; each branch reads a shorter one again."""
_ROWS = 16  # most texts of a batch
_STATE_BYTES, _LOGITS_BYTES = 256 << 20, 128 << 20
"""Most bytes of the states of a batch, and of the logits of one call."""

Ids = tuple[int, ...]


class Part(NamedTuple):
    """Logits [n, vocab] of a text's positions from `start` on; `row` is the text's in the state."""

    ids: Ids
    start: int
    logits: np.ndarray
    row: int


class PrefixReader:
    """Takes different texts through a session; `read` counts the tokens that the session took."""

    def __init__(self, session: Session, scored: Mapping[Ids, int]):
        """Takes ids → how many of their last positions have requested logits, at least 1."""
        self.session, self.read = session, 0
        self._first_scored = {ids: len(ids) - count for ids, count in scored.items()}

    @property
    def rows(self) -> int:
        return max(1, min(_ROWS, _STATE_BYTES // max(1, self.session.info.state_bytes)))

    def parts(self) -> Iterator[Part]:
        """Reads all texts and yields their requested logits, a long text's in several parts.

        A caller who changes the session's state must restore it before the next part.
        """
        self.session.reset()
        if texts := sorted(self._first_scored):  # texts with a common prefix become neighbours
            yield from self._read_from(texts, 0, self.session.get_state())

    def _read_from(self, texts: Sequence[Ids], start: int, state: State) -> Iterator[Part]:
        """Reads the rest of texts that share their first `start` tokens and the state there."""
        by_length = defaultdict(list)
        for branch in _branches(texts, start):
            if len(branch) == 1:
                by_length[len(branch[0])].append(branch[0])
                continue
            self.session.set_state(state)
            stop = _common(branch)
            yield from self._take([branch], start, stop)
            if len(branch[0]) == stop:
                branch = branch[1:]
            yield from self._read_from(branch, stop, self.session.get_state())
        for stop, single in by_length.items():
            for first in range(0, len(single), self.rows):
                batch = single[first : first + self.rows]
                self.session.set_state({n: a.repeat(len(batch), 0) for n, a in state.items()})
                yield from self._take([[ids] for ids in batch], start, stop)

    def _take(self, rows: Sequence[Sequence[Ids]], start: int, stop: int) -> Iterator[Part]:
        """Takes tokens `start` to `stop`; each row stands for texts that share these tokens."""
        tokens = np.array([texts[0][start:stop] for texts in rows], np.int64)
        first = min(self._first_scored[ids] for texts in rows for ids in texts)
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
            for row, texts in enumerate(rows):
                for ids in texts:
                    scored = max(begin, self._first_scored[ids])
                    if scored < end:
                        yield Part(ids, scored, logits[row, scored - begin :], row)
            position = end


def _branches(texts: Sequence[Ids], start: int) -> Iterator[Sequence[Ids]]:
    """Splits sorted texts into groups with a long common prefix, and single texts."""
    common = _common(texts)
    if len(texts) == 1 or common - start >= _SHORTEST_PREFIX:
        yield texts
        return
    for _, group in groupby(texts, lambda ids: ids[common : common + 1]):
        yield from _branches(list(group), start)


def _common(texts: Sequence[Ids]) -> int:
    """Returns how many tokens the first and the last of sorted texts share, and so all."""
    first, last = texts[0], texts[-1]
    pairs = enumerate(zip(first, last, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(last)))


@dataclass(frozen=True)
class ScoredText:
    """The ids that a model reads, and the targets it should predict, the last one after `ids`."""

    ids: Ids
    targets: Ids


def score(session: Session, scored: Sequence[ScoredText]) -> tuple[np.ndarray, np.ndarray, int]:
    """Reads texts and scores their targets, if any.

    Returns their nats [n], whether all are the likeliest, bool [n], and the tokens that were read.
    """
    by_ids = defaultdict(list)
    for index, text in enumerate(scored):
        if text.targets:
            by_ids[text.ids].append(index)
    longest = {ids: max(len(scored[i].targets) for i in same) for ids, same in by_ids.items()}
    sums, likeliest = np.zeros(len(scored)), np.ones(len(scored), bool)
    reader = PrefixReader(session, longest)
    for part in reader.parts():
        stop = part.start + len(part.logits)
        for index in by_ids[part.ids]:
            first = len(part.ids) - len(scored[index].targets)
            rows = part.logits[max(0, first - part.start) :]
            if len(rows):
                targets = np.array(scored[index].targets[stop - len(rows) - first : stop - first])
                sums[index] += nats(rows[None], targets[None]).sum()
                likeliest[index] &= bool((rows.argmax(-1) == targets).all())
    return sums, likeliest, reader.read
