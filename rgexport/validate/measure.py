"""Runs an artifact and its references over one text, side by side, and measures."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.validate import metrics
from rgexport.validate.positions import (
    PositionBlock,
    Spell,
    WorstPosition,
    WorstPositions,
    position_blocks,
)
from rgexport.validate.states import StateError, same_position, state_errors
from rgexport.validate.teacher import Pass

LOGITS_BYTES = 256 << 20
"""Logits of a block of positions, the artifact's and one reference's together."""
MAX_BLOCK = 512
STEPS = 8
"""The last tokens are taken once as a chunk and once more one by one; so many, and a chunk more
where it has a fixed length."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The artifact against one reference, over the whole text."""

    logits: metrics.LogitError
    kl: metrics.KL
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[StateError]
    blocks: list[PositionBlock]
    worst: list[WorstPosition]


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """The artifact against itself: its last tokens one by one against the same as one chunk."""

    tokens: int
    logits: metrics.LogitError
    states: list[StateError]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was measured by running; `original` is None where no original was given."""

    twin: Comparison
    original: Comparison | None
    steps: Equivalence
    same_position: bool


@dataclass(frozen=True)
class Chunk:
    """The logits of the last tokens of a chunk, [n, vocab], and the state behind it."""

    logits: np.ndarray
    state: State


def measure(
    session: Session,
    tokens: np.ndarray,
    twin: Pass,
    original: Pass | None = None,
    text_bytes: int | None = None,
    noise: float = 0.0,
    spell: Spell | None = None,
) -> Measurement:
    """Teacher-forces `session` with tokens [T] and compares it with the references' passes.

    The session takes the tokens in chunks and carries its state from one to the next, so what
    is compared is what a long conversation computes. Logits exist for one block at a time.

    Where a chunk has a fixed length, or gives one row of logits, it is the steps that are compared
    with the references there, and a chunk with the steps.

    Args:
        session: the artifact's.
        tokens: [T].
        twin: the pass of the reference with the artifact's weights.
        original: that of the reference with the weights that it was made from.
        text_bytes: the length of what the tokens stand for, in UTF-8.
        noise: what makes a near tie; see `metrics.agreement`.
        spell: writes the text of the worst positions.
    """
    references = [twin] if original is None else [twin, original]
    rows: list[list[np.ndarray]] = [[] for _ in references]
    worst = [WorstPositions(tokens, spell) for _ in references]
    next_tokens = np.append(tokens[1:], -1)
    before: State = {}
    tail = np.empty((0, session.vocab_size), np.float32)

    session.reset()
    again = max(0, len(tokens) - _taken_again(session.info))
    with task("Comparing", len(tokens), "tokens") as advance:
        for start, stop in _blocks(again, len(tokens), _block_size(session)):
            if start == again:
                before = session.get_state()
            tail = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
            for reference, found, collector in zip(references, rows, worst, strict=True):
                expected = reference.logits(start, stop)
                found.append(metrics.compare_logits(expected, tail, next_tokens[start:stop]))
                collector.see(start, found[-1]["kl"], expected, tail)
            advance(stop - start)
    state = session.get_state()
    comparisons = [
        Comparison(
            states=state_errors(reference.state, state),
            worst=collector.ranking(),
            **_summaries(np.concatenate(found), text_bytes, noise),
        )
        for reference, found, collector in zip(references, rows, worst, strict=True)
    ]
    return Measurement(
        twin=comparisons[0],
        original=comparisons[1] if original is not None else None,
        steps=_equivalence(session, tokens[again:], before, Chunk(tail, state)),
        same_position=same_position(twin.state, state),
    )


def _taken_again(info: SessionInfo) -> int:
    """How many of the last tokens are taken twice."""
    return STEPS + (info.prefill_chunk if info.whole_chunks else 0)


def _block_size(session: Session) -> int:
    """Positions whose logits fit into the memory meant for them; whole chunks where it can be."""
    size = min(MAX_BLOCK, max(STEPS, LOGITS_BYTES // (2 * 4 * session.vocab_size)))
    chunk = session.info.prefill_chunk
    return size - size % chunk if session.info.whole_chunks and size > chunk else size


def _blocks(again: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """Blocks of positions, of up to `size`; one begins at `again`."""
    for first, last in ((0, again), (again, length)):
        for start in range(first, last, size):
            yield start, min(start + size, last)


def _summaries(rows: np.ndarray, text_bytes: int | None, noise: float) -> dict[str, Any]:
    """What a `Comparison` has of the rows."""
    return {
        "logits": metrics.logit_error(rows),
        "kl": metrics.kl_summary(rows),
        "agreement": metrics.agreement(rows, noise),
        "likelihood": metrics.likelihood(rows, text_bytes),
        "blocks": position_blocks(rows),
    }


def _equivalence(session: Session, tokens: np.ndarray, before: State, chunk: Chunk) -> Equivalence:
    """Goes back to the state `before` and takes the tokens of `chunk` one by one.

    Where only whole chunks are chunks, that may not have been one: it is then taken again, and a
    text that is too short for one is repeated.
    """
    if session.info.whole_chunks:
        tokens = np.resize(tokens, _taken_again(session.info))
        session.set_state(before)
        chunk = _take_whole_chunk(session, tokens)
    session.set_state(before)
    last = deque((session.step(token[None])[0] for token in tokens), maxlen=len(chunk.logits))
    rows = metrics.compare_logits(chunk.logits, np.stack(last), np.full(len(last), -1))
    return Equivalence(
        tokens=len(tokens),
        logits=metrics.logit_error(rows),
        states=state_errors(chunk.state, session.get_state()),
    )


def _take_whole_chunk(session: Session, tokens: np.ndarray) -> Chunk:
    """Takes a chunk with as many logits as it gives, and the tokens behind it."""
    known = min(session.info.prefill_chunk, _block_size(session))
    count = known if session.info.chunk_logits else 1
    logits = [
        session.prefill(part[None], num_logits=wanted)[0]
        for part, wanted in ((tokens[:-STEPS], count), (tokens[-STEPS:], STEPS))
    ]
    return Chunk(np.concatenate(logits), session.get_state())
