"""Runs an artifact over one text and compares it with the references' passes over the same text.

What is kept of a comparison has a fixed size, however long the text and large the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.session import MAX_BLOCK, Session, block_size, blocks, whole_chunks
from rgexport.validate import metrics
from rgexport.validate.equivalences import (
    STEPS,
    ChunkResult,
    Ending,
    Equivalence,
    compare_with_itself,
    repeated_tokens,
)
from rgexport.validate.reference_pass import Pass

BLOCKS = 128
"""The most blocks; their lengths differ by one position at most."""
WORST = 10
CHOICES = 5

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
    """A position with a large KL, the text before it, and what both models expect next."""

    position: int
    kl: float
    next_token: int | None
    next_text: str | None
    context: str | None
    reference: list[TokenChoice]
    candidate: list[TokenChoice]


def position_blocks(rows: np.ndarray) -> list[PositionBlock]:
    count, cut = min(BLOCKS, len(rows)), []
    for start, stop in pairwise(len(rows) * index // count for index in range(count + 1)):
        kl, top1 = rows["kl"][start:stop], float(rows["top1"][start:stop].mean())
        mean, most = float(kl.mean()), float(kl.max())
        cut.append(PositionBlock(start=start, stop=stop, kl_mean=mean, kl_max=most, top1=top1))
    return cut


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
                    context=self._text(ids[: position + 1][-24:]),
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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The artifact against one reference, over the whole text; `states` are those after its end."""

    logits: metrics.LogitError
    kl: metrics.KL
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[metrics.StateError]
    drift: list[metrics.Drift]
    blocks: list[PositionBlock]
    worst: list[WorstPosition]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """An artifact's comparisons; `counted` says whether the session counted every token."""

    comparisons: list[Comparison]
    equivalences: dict[str, Equivalence]
    counted: bool
    ending: Ending


class ComparisonRecorder:
    """Compares an artifact with one reference, block by block."""

    def __init__(self, reference: Pass, tokens: np.ndarray, spell: TokenText | None = None):
        self._reference = reference
        self._following = np.append(tokens[1:], -1)
        self._worst = WorstPositions(tokens, spell)
        self._rows: list[np.ndarray] = []
        self._drift: list[metrics.Drift] = []

    def add(self, start: int, logits: np.ndarray) -> None:
        """Takes the artifact's logits [n, vocab] of the positions from `start` on."""
        stop = start + len(logits)
        expected = self._reference.logits(start, stop)
        self._rows.append(metrics.compare_logits(expected, logits, self._following[start:stop]))
        self._worst.add(start, self._rows[-1]["kl"], expected, logits)

    def add_state(self, position: int, state: State) -> None:
        errors = metrics.state_errors(self._reference.drift[position], state)
        self._drift.append(metrics.Drift(position=position, states=errors))

    def comparison(
        self, state: State, text_bytes: int | None = None, noise: float = 0.0
    ) -> Comparison:
        rows = np.concatenate(self._rows)
        return Comparison(
            logits=metrics.logit_error(rows),
            kl=metrics.kl_summary(rows),
            agreement=metrics.agreement(rows, noise),
            likelihood=metrics.likelihood(rows, text_bytes),
            states=metrics.state_errors(self._reference.state, state),
            drift=self._drift,
            blocks=position_blocks(rows),
            worst=self._worst.worst,
        )


def measure(
    session: Session,
    tokens: np.ndarray,
    references: Sequence[Pass],
    *,
    text_bytes: int | None = None,
    noise: float = 0.0,
    spell: TokenText | None = None,
    longest: int = MAX_BLOCK,
) -> Measurement:
    """Teacher-forces `session` with tokens [T] and compares it with the references' passes.

    Logits exist for one block at a time. Where a chunk has a fixed length, or gives one row of
    logits, the text is taken in steps, and `equivalences` compares a chunk with them. `text_bytes`
    is the text's length in UTF-8; `noise` makes a near tie, see `metrics.agreement`; `spell` writes
    the text of the worst positions; `longest` is the most tokens of a call.
    """
    sides = [ComparisonRecorder(reference, tokens, spell) for reference in references]
    stops = metrics.checkpoints(len(tokens))
    again = max(0, len(tokens) - repeated_tokens(session.info))
    long = again if session.info.whole_chunks else max(0, len(tokens) - longest)
    edges = {again, long, len(tokens)} | whole_chunks(session, stops)
    before: dict[int, State] = {}
    head = logits = np.empty((0, session.vocab_size), np.float32)
    session.reset()
    with task("Comparing", len(tokens), "tokens") as advance:
        for start, stop in blocks(session, edges):
            if start in (again, long):
                before[start] = session.get_state()
            logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
            head = logits[:STEPS].copy() if start == 0 else head
            for side in sides:
                side.add(start, logits)
            if sides and stop in stops:
                state = metrics.recent(session.get_state())
                for side in sides:
                    side.add_state(stop, state)
            advance(stop - start)
    counted = session.position.tolist() == [len(tokens)]
    ending = Ending(tokens[long:], before[long], ChunkResult(logits, session.get_state()))
    last = tokens[again:], before[again]
    same = compare_with_itself(session, tokens, head, last, ending, block_size(session))
    return Measurement(
        comparisons=[side.comparison(ending.chunk.state, text_bytes, noise) for side in sides],
        equivalences=same,
        counted=counted,
        ending=ending,
    )
