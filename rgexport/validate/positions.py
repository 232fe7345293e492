"""Differences of two models along a text: means over blocks of positions, and worst positions.

Both have a fixed size, however long the text and however large the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rgexport.chat.tokenizer import Tokenizer

BLOCKS = 128
"""The most blocks; their lengths differ by one position at most."""
WORST = 10
CHOICES = 5
CONTEXT = 24
"""Tokens of the text that are shown before a position's prediction."""

TokenText = Callable[[Sequence[int]], str]
"""The text of ids: special ones as their literals, bytes of incomplete characters as `\\xf0`."""


@dataclass(frozen=True, kw_only=True)
class PositionBlock:
    """Positions from `start` until before `stop`: KL in nats, `top1` a share in [0, 1]."""

    start: int
    stop: int
    kl_mean: float
    kl_max: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """One token that may come next, its probability, and its text if there is a tokenizer."""

    token: int
    probability: float
    text: str | None


@dataclass(frozen=True, kw_only=True)
class WorstPosition:
    """A position with a large KL, and what both models expect after it, likeliest first.

    `next_token` follows in the text, None at its end; `context` is the text of the last tokens up
    to the position itself.
    """

    position: int
    kl: float
    next_token: int | None
    next_text: str | None
    context: str | None
    reference: list[TokenChoice]
    candidate: list[TokenChoice]


def position_blocks(rows: np.ndarray) -> list[PositionBlock]:
    """Cuts rows of `metrics.ROWS` into at most `BLOCKS` blocks."""
    count = min(BLOCKS, len(rows))
    return [
        PositionBlock(
            start=start,
            stop=stop,
            kl_mean=float(rows["kl"][start:stop].mean()),
            kl_max=float(rows["kl"][start:stop].max()),
            top1=float(rows["top1"][start:stop].mean()),
        )
        for start, stop in pairwise(len(rows) * index // count for index in range(count + 1))
    ]


def token_text(tokenizer: Tokenizer) -> TokenText:
    def spell(ids: Sequence[int]) -> str:
        pieces = (tokenizer.surface(i) or tokenizer.literal(i).encode() for i in ids)
        return b"".join(pieces).decode("utf-8", "backslashreplace")

    return spell


class WorstPositions:
    """Collects the `WORST` positions with the largest KL in `worst`, the worst first."""

    def __init__(self, tokens: np.ndarray, spell: TokenText | None = None):
        self._tokens, self._spell = tokens, spell
        self.worst: list[WorstPosition] = []

    def add(self, start: int, kl: np.ndarray, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Takes the positions from `start` on: kl [n], and logits [n, vocab] of both models."""
        ranks = np.nan_to_num(kl, nan=math.inf, posinf=math.inf)  # NaN is worse than any number
        for index in np.argsort(-ranks, kind="stable")[:WORST].tolist():
            if len(self.worst) == WORST and ranks[index] <= _rank(self.worst[-1]):
                return
            position = start + index
            ids = self._tokens[: position + 2].tolist()
            after = ids[position + 1] if len(ids) > position + 1 else None
            self.worst.append(
                WorstPosition(
                    position=position,
                    kl=float(kl[index]),
                    next_token=after,
                    next_text=None if after is None else self._text([after]),
                    context=self._text(ids[max(0, position + 1 - CONTEXT) : position + 1]),
                    reference=self._choices(reference[index]),
                    candidate=self._choices(candidate[index]),
                )
            )
            self.worst.sort(key=lambda one: (-_rank(one), one.position))
            del self.worst[WORST:]

    def _choices(self, logits: np.ndarray) -> list[TokenChoice]:
        wide = logits.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            share = np.exp(wide - wide.max())
            share /= share.sum()
        return [
            TokenChoice(token=token, probability=float(share[token]), text=self._text([token]))
            for token in np.argsort(-wide, kind="stable")[:CHOICES].tolist()
        ]

    def _text(self, ids: Sequence[int]) -> str | None:
        return None if self._spell is None else self._spell(ids)


def _rank(position: WorstPosition) -> float:
    return math.inf if math.isnan(position.kl) else position.kl
