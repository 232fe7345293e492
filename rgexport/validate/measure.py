"""Runs an artifact over one text and compares it with the references' passes over the same text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.blocks import MAX_BLOCK, block_size, blocks, whole_chunks
from rgexport.runtimes.session import Session
from rgexport.validate import metrics
from rgexport.validate.equivalences import (
    STEPS,
    Chunk,
    Equivalence,
    compared,
    equivalences,
    from_start,
    in_batch,
    taken_again,
)
from rgexport.validate.portable import Ending, long_call
from rgexport.validate.positions import (
    PositionBlock,
    TokenText,
    WorstPosition,
    WorstPositions,
    position_blocks,
)
from rgexport.validate.reference_pass import Pass
from rgexport.validate.states import Drift, StateError, checkpoints, recent, state_errors


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The artifact against one reference, over the whole text.

    `states` are those after its end, `drift` those on the way.
    """

    logits: metrics.LogitError
    kl: metrics.KL
    agreement: metrics.Agreement
    likelihood: metrics.Likelihood | None
    states: list[StateError]
    drift: list[Drift]
    blocks: list[PositionBlock]
    worst: list[WorstPosition]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was measured by running the artifact.

    Attributes:
        comparisons: with each reference.
        equivalences: with itself.
        counted: whether the session counted every token.
        ending: the end of the text, as the session took it.
    """

    comparisons: list[Comparison]
    equivalences: dict[str, Equivalence]
    counted: bool
    ending: Ending


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

    The session takes the tokens in chunks and carries its state from one to the next, so what
    is compared is what a long conversation computes. Logits exist for one block at a time.

    Where a chunk has a fixed length, or gives one row of logits, the text is taken in steps, and
    `equivalences` compares a chunk with the steps.

    Args:
        session: the artifact's.
        tokens: [T].
        references: passes over the same tokens; there may be none.
        text_bytes: the length of what the tokens stand for, in UTF-8.
        noise: the tolerated error of logits, which makes a near tie; see `metrics.agreement`.
        spell: writes the text of the worst positions.
        longest: most tokens of one call, see `portable.longest_call`.
    """
    sides = [_Side(reference, WorstPositions(tokens, spell)) for reference in references]
    following = np.append(tokens[1:], -1)
    session.reset()
    again = max(0, len(tokens) - taken_again(session.info))
    long = again if session.info.whole_chunks else max(0, len(tokens) - longest)
    before: dict[int, State] = {}
    head = logits = np.empty((0, session.vocab_size), np.float32)
    with task("Comparing", len(tokens), "tokens") as advance:
        edges = {again, long, len(tokens)} | whole_chunks(session, checkpoints(len(tokens)))
        for start, stop in blocks(session, edges):
            if start in (again, long):
                before[start] = session.get_state()
            logits = session.prefill(tokens[None, start:stop], num_logits=stop - start)[0]
            head = logits[:STEPS].copy() if start == 0 else head
            _compare(sides, session, start, logits, following[start:stop])
            advance(stop - start)
    counted = session.position.tolist() == [len(tokens)]
    chunk = Chunk(logits, session.get_state())
    ending = Ending(tokens[long:], before[long], chunk)
    same = equivalences(session, tokens[again:], before[again], chunk, block_size(session))
    same |= from_start(session, tokens[: len(head)], head, chunk.state)
    if not session.info.whole_chunks:  # such an engine has no longer calls, and takes rows in turn
        same["long"] = long_call(session, ending)
        same["batch"] = compared(
            in_batch(session, tokens, chunk.state), 2 * min(STEPS, len(tokens))
        )
    return Measurement(
        comparisons=[side.summary(chunk.state, text_bytes, noise) for side in sides],
        equivalences=same,
        counted=counted,
        ending=ending,
    )


class _Side:
    """What is collected for one reference on the way through the text."""

    def __init__(self, reference: Pass, worst: WorstPositions):
        self.reference = reference
        self._worst = worst
        self._rows: list[np.ndarray] = []
        self._drift: list[Drift] = []

    def see(self, start: int, logits: np.ndarray, following: np.ndarray) -> None:
        """Takes the artifact's logits [n, vocab] of the positions from `start` on."""
        expected = self.reference.logits(start, start + len(logits))
        self._rows.append(metrics.compare_logits(expected, logits, following))
        self._worst.see(start, self._rows[-1]["kl"], expected, logits)

    def see_state(self, position: int, state: State) -> None:
        """Takes the artifact's state after `position` tokens."""
        errors = state_errors(self.reference.drift[position], state)
        self._drift.append(Drift(position=position, states=errors))

    def summary(self, state: State, text_bytes: int | None, noise: float) -> Comparison:
        """The comparison; `state` is the artifact's after the text."""
        rows = np.concatenate(self._rows)
        return Comparison(
            logits=metrics.logit_error(rows),
            kl=metrics.kl_summary(rows),
            agreement=metrics.agreement(rows, noise),
            likelihood=metrics.likelihood(rows, text_bytes),
            states=state_errors(self.reference.state, state),
            drift=self._drift,
            blocks=position_blocks(rows),
            worst=self._worst.found,
        )


def _compare(
    sides: Sequence[_Side],
    session: Session,
    start: int,
    logits: np.ndarray,
    following: np.ndarray,
) -> None:
    """Compares a block's logits, and the state after it where the references kept theirs."""
    stop = start + len(logits)
    for side in sides:
        side.see(start, logits, following)
    if sides and stop in sides[0].reference.drift:
        state = recent(session.get_state())
        for side in sides:
            side.see_state(stop, state)
