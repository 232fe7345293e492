"""Runs an artifact over one text and compares it with the references' passes over the same text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """The comparisons of an artifact with each reference and with itself.

    `counted` says whether the session counted every token; `ending` is the end of the text.
    """

    comparisons: list[Comparison]
    equivalences: dict[str, Equivalence]
    counted: bool
    ending: Ending


class ComparisonRecorder:
    """Compares an artifact with one reference, block by block."""

    def __init__(self, reference: Pass, tokens: np.ndarray, spell: TokenText | None = None):
        """`tokens` [T] are the reference's; `spell` writes the text of the worst positions."""
        self._reference = reference
        self._following = np.append(tokens[1:], -1)
        self._worst = WorstPositions(tokens, spell)
        self._rows: list[np.ndarray] = []
        self._drift: list[Drift] = []

    def add(self, start: int, logits: np.ndarray) -> None:
        """Takes the artifact's logits [n, vocab] of the positions from `start` on."""
        stop = start + len(logits)
        expected = self._reference.logits(start, stop)
        self._rows.append(metrics.compare_logits(expected, logits, self._following[start:stop]))
        self._worst.add(start, self._rows[-1]["kl"], expected, logits)

    def add_state(self, position: int, state: State) -> None:
        """Takes the artifact's state after `position` tokens."""
        errors = state_errors(self._reference.drift[position], state)
        self._drift.append(Drift(position=position, states=errors))

    def comparison(
        self, state: State, text_bytes: int | None = None, noise: float = 0.0
    ) -> Comparison:
        """Summarizes all blocks; `state` is the artifact's after the text, see `measure`."""
        rows = np.concatenate(self._rows)
        return Comparison(
            logits=metrics.logit_error(rows),
            kl=metrics.kl_summary(rows),
            agreement=metrics.agreement(rows, noise),
            likelihood=metrics.likelihood(rows, text_bytes),
            states=state_errors(self._reference.state, state),
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

    The session takes the tokens in chunks and carries its state from one to the next, as in a long
    conversation. Logits exist for one block at a time. Where a chunk has a fixed length, or gives
    one row of logits, the text is taken in steps, and `equivalences` compares a chunk with them.

    Args:
        session: the artifact's.
        tokens: [T].
        references: passes over the same tokens; there may be none.
        text_bytes: the length of the tokens' text in UTF-8.
        noise: the tolerated error of logits, which makes a near tie; see `metrics.agreement`.
        spell: writes the text of the worst positions.
        longest: most tokens of one call, see `equivalences.longest_call`.
    """
    sides = [ComparisonRecorder(reference, tokens, spell) for reference in references]
    stops = checkpoints(len(tokens))
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
                state = recent(session.get_state())
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
