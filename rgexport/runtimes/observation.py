"""The intermediate values of an artifact, at the sites of the step model."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rgexport.griffin.state import State

LENGTHS = (32, 1)
"""`Observer.lengths` of an engine that takes any number of tokens in one call."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One call of an engine on tokens [T] of one conversation.

    Attributes:
        values: site → result of its op, converted to float32 [T, n]. Sites that the engine fuses
            away are missing. Those of `HEAD_SITES` may be of the last token alone, [1, n].
        gates: the same for the gates of the RG-LRU, where the engine has them only after the
            sigmoid.
        dtypes: site → the dtype that the value was computed in, where it is not float32.
        state: the canonical state of batch 1 after the tokens.
    """

    values: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    dtypes: dict[str, str]
    state: State


class Observer(Protocol):
    """An engine that shows the values at its sites."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of tokens per call that take different code paths, the longest first.

        Such as a chunk and a single token.
        """
        ...

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        """Takes tokens [T], T in `lengths`, from a canonical state of batch 1, in one call."""
        ...


def observed(found: dict[str, np.ndarray], state: State) -> Observation:
    """Makes an observation of one conversation.

    Args:
        found: site → [1, T, n] in the engine's dtype; it is emptied, to save memory.
        state: the canonical state after the tokens.
    """
    dtypes = {site: a.dtype.name for site, a in found.items() if a.dtype != np.float32}
    values = {}
    for site in tuple(found):
        values[site] = found.pop(site)[0].astype(np.float32, copy=False)
    return Observation(values=values, gates={}, dtypes=dtypes, state=state)
