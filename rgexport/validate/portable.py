"""The end of a text in one long call, and an artifact without native kernels.

Other runtimes take a prompt in one call, and run the bodies of the functions that our kernels
replace.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session
from rgexport.validate.equivalences import (
    STEPS,
    Chunk,
    Equivalence,
    chunk_and_steps,
    compared,
    in_batch,
    in_pieces,
    zeros_of,
)
from rgexport.validate.reference_pass import Pass
from rgexport.validate.states import checkpoints, recent

SCORES_BYTES = 64 << 20
"""Float32 scores of one layer's attention, of which a stock runtime holds several copies."""
LONGEST = 2048
"""Most tokens of a long call, whose activations take memory too."""


@dataclass(frozen=True)
class Ending:
    """The last tokens [T] of a text, the state before them, and what they gave."""

    tokens: np.ndarray
    before: State
    gave: Chunk


def longest_call(config: GriffinConfig) -> int:
    """Tokens of one call whose scores, [tokens, heads, window + tokens], fit `SCORES_BYTES`."""
    window, scores = config.window, SCORES_BYTES / 4 / config.num_heads
    tokens = int((math.sqrt(window**2 + 4 * scores) - window) / 2)
    return max(STEPS, min(LONGEST, tokens))


def long_call(session: Session, ending: Ending) -> Equivalence:
    """Takes the last tokens of a text in one call."""
    return compared([(ending.gave, _at_once(session, ending))], len(ending.tokens))


def portable(session: Session, tokens: np.ndarray, reference: Pass, ending: Ending) -> Equivalence:
    """Takes the beginning and the end of a text in a session without native kernels.

    The beginning is an odd number of tokens and three single ones; they are compared with the
    reference. The end is one long call, compared with what native kernels gave. The rows of a batch
    are compared with what each gives alone.

    Args:
        session: of the artifact, in any state.
        tokens: the text [T].
        reference: its pass over the text.
        ending: the end of the text, in a session with native kernels.
    """
    count = next(iter(checkpoints(len(tokens))), len(tokens))
    state = reference.drift.get(count) or recent(reference.state)
    start, sizes = zeros_of(ending.before), chunk_and_steps(count)
    (first,) = in_pieces(session, tokens[None, :count], start, sizes, count)
    first = replace(first, state=recent(first.state))
    pairs = [
        (Chunk(reference.logits(0, count), state), first),
        (ending.gave, _at_once(session, ending)),
        *in_batch(session, tokens, ending.gave.state),
    ]
    return compared(pairs, count + len(ending.tokens))


def _at_once(session: Session, ending: Ending) -> Chunk:
    session.set_state(ending.before)
    logits = session.prefill_at_once(ending.tokens[None], num_logits=len(ending.gave.logits))[0]
    return Chunk(logits, session.get_state())
