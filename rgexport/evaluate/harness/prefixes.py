"""Reads many texts, of which those that begin alike are read once up to where they part.

The texts are a tree. A part that several have in common goes through the model once; its state is
kept, and each branch goes on from there. Where only one text is left, texts of one length form a
batch.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from rgexport.griffin.state import State
from rgexport.runtimes.session import Session

_LEAST = 8
"""Tokens that are worth a state of their own: fewer are read again in each branch."""
_ROWS = 16
"""Most texts of a batch."""
_STATE_BYTES, _LOGITS_BYTES = 256 << 20, 128 << 20
"""Of the states of a batch, and of the logits of one call."""


@dataclass(frozen=True)
class Text:
    """Token ids, at least one, and of how many of the last of them the logits are wanted."""

    ids: tuple[int, ...]
    wanted: int


class Reader(ABC):
    """Takes texts, all of them different, through a session.

    Attributes:
        texts: in the order in which they are a tree; a *place* is an index of them.
        read: the tokens that the session took.
    """

    def __init__(self, session: Session, texts: Sequence[Text]):
        self.session = session
        self.texts = sorted(texts, key=lambda text: text.ids)
        self.read = 0

    @property
    def rows(self) -> int:
        """Texts of a batch, whose states fit into memory."""
        return max(1, min(_ROWS, _STATE_BYTES // max(1, self.session.info.state_bytes)))

    def run(self) -> None:
        """Reads all texts; afterwards the session has any state.

        Raises:
            RequestError: the model gives NaN or infinite logits.
        """
        self.session.reset()
        if self.texts:
            self._spread(range(len(self.texts)), 0, self.session.get_state())

    @abstractmethod
    def heard(self, place: int, logits: np.ndarray) -> None:
        """Takes the logits [n, vocab] of the next positions of which a text wants some."""

    @abstractmethod
    def ended(self, places: Sequence[int]) -> None:
        """Is called when the rows of the session have read these texts; may change its state."""

    def _spread(self, places: Sequence[int], start: int, state: State) -> None:
        """Reads on in texts that have their first `start` tokens in common, and the state there."""
        single = defaultdict(list)
        for branch in self._branches(places, start):
            if len(branch) == 1:
                single[len(self.texts[branch[0]].ids)].append(branch[0])
                continue
            self.session.set_state(state)
            self._through(branch, start)
        for stop, alike in single.items():
            for first in range(0, len(alike), self.rows):
                batch = alike[first : first + self.rows]
                self.session.set_state({n: a.repeat(len(batch), 0) for n, a in state.items()})
                self._take([[place] for place in batch], start, stop)
                self.ended(batch)

    def _through(self, places: Sequence[int], start: int) -> None:
        """Reads what texts have in common, and then the rest of each."""
        stop = self._common(places)
        self._take([places], start, stop)
        state = self.session.get_state()
        if len(self.texts[places[0]].ids) == stop:
            self.ended(places[:1])
            places = places[1:]
        self._spread(places, stop, state)

    def _branches(self, places: Sequence[int], start: int) -> Iterator[Sequence[int]]:
        """The texts by what is worth to be read once."""
        common = self._common(places)
        if len(places) == 1 or common - start >= _LEAST:
            yield places
            return
        for _, alike in groupby(places, lambda place: self.texts[place].ids[common : common + 1]):
            yield from self._branches(list(alike), start)

    def _common(self, places: Sequence[int]) -> int:
        """How many tokens texts have in common: in their order, the first and the last one."""
        first, last = self.texts[places[0]].ids, self.texts[places[-1]].ids
        same = (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
        return next(same, min(len(first), len(last)))

    def _take(self, rows: Sequence[Sequence[int]], start: int, stop: int) -> None:
        """Takes tokens of each row, which are the same in all texts of a row."""
        tokens = np.array([self.texts[places[0]].ids[start:stop] for places in rows], np.int64)
        first = min(stop, max(start, min(self._first(place) for row in rows for place in row)))
        room = max(1, _LOGITS_BYTES // (4 * self.session.vocab_size * len(rows)))
        at = start
        while at < stop:
            begin = max(first, at)
            end = min(begin + room, stop)
            logits = self.session.prefill(tokens[:, at - start : end - start], end - begin)
            self.read += len(rows) * (end - at)
            self._tell(rows, begin, logits[:, -(end - begin) :] if end > begin else logits[:, :0])
            at = end

    def _tell(self, rows: Sequence[Sequence[int]], begin: int, logits: np.ndarray) -> None:
        """Hands logits [R, n, vocab] of the positions from `begin` on to those who want them."""
        for places, row in zip(rows, logits, strict=True):
            for place in places:
                if len(own := row[max(0, self._first(place) - begin) :]):
                    self.heard(place, own)

    def _first(self, place: int) -> int:
        """The first position of which a text wants the logits."""
        return len(self.texts[place].ids) - self.texts[place].wanted
