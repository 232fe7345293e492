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
"""Positions that are kept with their texts."""
CHOICES = 5
"""Most likely next tokens that are kept of a position."""
CONTEXT_TOKENS = 24
"""Tokens of text that are kept before a position."""

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
    """Summarizes the rows of all positions, of dtype `metrics.ROWS`, in at most `BLOCKS` blocks."""
    count = min(BLOCKS, len(rows))
    edges = [len(rows) * index // count for index in range(count + 1)]
    blocks = []
    for start, stop in pairwise(edges):
        kl = rows["kl"][start:stop]
        block = PositionBlock(
            start=start,
            stop=stop,
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1=float(rows["top1"][start:stop].mean()),
        )
        blocks.append(block)
    return blocks


def token_text(tokenizer: Tokenizer) -> TokenText:
    """Returns a function that writes ids as text, see `TokenText`."""

    def spell(ids: Sequence[int]) -> str:
        pieces = (tokenizer.surface(i) or tokenizer.literal(i).encode() for i in ids)
        return b"".join(pieces).decode("utf-8", "backslashreplace")

    return spell


class WorstPositions:
    """Collects the `WORST` positions with the largest KL in `worst`, the worst first."""

    def __init__(self, tokens: np.ndarray, spell: TokenText | None = None):
        self._tokens = tokens
        self._spell = spell
        self.worst: list[WorstPosition] = []

    def add(self, start: int, kl: np.ndarray, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Takes the positions from `start` on: kl [n], and logits [n, vocab] of both models."""
        ranks = np.nan_to_num(kl, nan=math.inf, posinf=math.inf)  # NaN is worse than any number
        for index in np.argsort(-ranks, kind="stable")[:WORST].tolist():
            if len(self.worst) == WORST and ranks[index] <= _rank(self.worst[-1]):
                return
            position = self._describe(start + index, kl[index], reference[index], candidate[index])
            self.worst.append(position)
            self.worst.sort(key=_descending_rank)
            del self.worst[WORST:]

    def _describe(
        self, position: int, kl: float, reference: np.ndarray, candidate: np.ndarray
    ) -> WorstPosition:
        """Returns a position by its logits, [vocab] of each model."""
        context = self._tokens[: position + 1].tolist()
        next_token = None
        next_text = None
        if position + 1 < len(self._tokens):
            next_token = int(self._tokens[position + 1])
            next_text = self._text([next_token])
        return WorstPosition(
            position=position,
            kl=float(kl),
            next_token=next_token,
            next_text=next_text,
            context=self._text(context[-CONTEXT_TOKENS:]),
            reference=self._choices(reference),
            candidate=self._choices(candidate),
        )

    def _choices(self, logits: np.ndarray) -> list[TokenChoice]:
        """Returns the most likely tokens by logits [vocab], the likeliest first."""
        wide = logits.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            probabilities = np.exp(wide - wide.max())
            probabilities /= probabilities.sum()
        choices = []
        for token in np.argsort(-wide, kind="stable")[:CHOICES].tolist():
            probability = float(probabilities[token])
            text = self._text([token])
            choices.append(TokenChoice(token=token, probability=probability, text=text))
        return choices

    def _text(self, ids: Sequence[int]) -> str | None:
        if self._spell is None:
            return None
        return self._spell(ids)


def _rank(position: WorstPosition) -> float:
    return math.inf if math.isnan(position.kl) else position.kl


def _descending_rank(position: WorstPosition) -> tuple[float, int]:
    """Sorts by the largest KL first; of equal ones, the first position is first."""
    return -_rank(position), position.position


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
    """A comparison of an artifact with one reference that grows block by block."""

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
        rows = metrics.compare_logits(expected, logits, self._following[start:stop])
        self._rows.append(rows)
        self._worst.add(start, rows["kl"], expected, logits)

    def add_state(self, position: int, state: State) -> None:
        """Takes the artifact's state after `position` tokens, reduced by `metrics.recent`."""
        errors = metrics.state_errors(self._reference.drift[position], state)
        self._drift.append(metrics.Drift(position=position, states=errors))

    def comparison(
        self, state: State, text_bytes: int | None = None, noise: float = 0.0
    ) -> Comparison:
        """Returns the comparison over the whole text; `state` is the artifact's after it."""
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
    recorders = [ComparisonRecorder(reference, tokens, spell) for reference in references]
    repeat_start = max(0, len(tokens) - repeated_tokens(session.info))
    ending_start = repeat_start
    if not session.info.whole_chunks:
        ending_start = max(0, len(tokens) - longest)

    head, last_logits, states = _force(session, tokens, recorders, {repeat_start, ending_start})
    counted = session.position.tolist() == [len(tokens)]

    final_state = session.get_state()
    ending = Ending(
        tokens[ending_start:], states[ending_start], ChunkResult(last_logits, final_state)
    )
    repeated = (tokens[repeat_start:], states[repeat_start])
    equivalences = compare_with_itself(session, tokens, head, repeated, ending, block_size(session))
    return Measurement(
        comparisons=[each.comparison(final_state, text_bytes, noise) for each in recorders],
        equivalences=equivalences,
        counted=counted,
        ending=ending,
    )


def _force(
    session: Session,
    tokens: np.ndarray,
    recorders: Sequence[ComparisonRecorder],
    starts: set[int],
) -> tuple[np.ndarray, np.ndarray, dict[int, State]]:
    """Takes tokens [T] from position 0 and passes their logits and states to the recorders.

    Returns the logits [n, vocab] of the first tokens and of the last block, and the states at
    `starts`, where blocks begin.
    """
    checkpoints = metrics.checkpoints(len(tokens))
    edges = {*starts, len(tokens)} | whole_chunks(session, checkpoints)
    states: dict[int, State] = {}
    head = logits = np.empty((0, session.vocab_size), np.float32)
    session.reset()
    with task("Comparing", len(tokens), "tokens") as advance:
        for start, stop in blocks(session, edges):
            if start in starts:
                states[start] = session.get_state()
            logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
            if start == 0:
                head = logits[:STEPS].copy()
            for recorder in recorders:
                recorder.add(start, logits)
            if recorders and stop in checkpoints:
                state = metrics.recent(session.get_state())
                for recorder in recorders:
                    recorder.add_state(stop, state)
            advance(stop - start)
    return head, logits, states
