"""How likely texts are, each after another one."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.evaluate.harness.prefixes import Reader, Text
from rgexport.evaluate.losses import nats
from rgexport.runtimes.session import Session


@dataclass(frozen=True)
class Scored:
    """What a model reads, and the tokens that it is to expect: the last one comes after `ids`."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


class Likelihoods(Reader):
    """Reads texts and scores their targets, which may be none.

    Attributes:
        nats: [n], the negative log likelihoods.
        likeliest: [n] bool, whether each target is the likeliest token at its place.
    """

    def __init__(self, session: Session, scored: Sequence[Scored]):
        self._targets = [np.array(one.targets, np.int64) for one in scored]
        self._of = defaultdict(list)
        for index, one in enumerate(scored):
            if one.targets:
                self._of[one.ids].append(index)
        self.nats, self.likeliest = np.zeros(len(scored)), np.ones(len(scored), bool)
        texts = [
            Text(ids, max(len(self._targets[index]) for index in own))
            for ids, own in self._of.items()
        ]
        super().__init__(session, texts)
        self._at = [len(text.ids) - text.wanted for text in self.texts]

    def heard(self, place: int, logits: np.ndarray) -> None:
        """Scores the targets at the next positions of a text."""
        ids, start = self.texts[place].ids, self._at[place]
        stop = self._at[place] = start + len(logits)
        for index in self._of[ids]:
            first = len(ids) - len(self._targets[index])
            own = logits[max(0, first - start) :]
            if not len(own):
                continue
            targets = self._targets[index][stop - len(own) - first : stop - first]
            self.nats[index] += nats(own[None], targets[None]).sum()
            self.likeliest[index] &= bool((own.argmax(-1) == targets).all())

    def ended(self, places: Sequence[int]) -> None:
        """All that is wanted was heard."""
