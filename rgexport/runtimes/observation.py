"""What an artifact computes on the way: the values at the sites of the step model."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rgexport.griffin.state import State

LENGTHS = (32, 1)
"""Of an engine that takes any number of tokens in one call: a short chunk, and a single token."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One call of an engine on tokens [T] of one conversation.

    Attributes:
        values: site → what its op gave, float32 [T, n], whatever dtype it was computed in; a site
            that the engine has not (a fused one) is missing. Those of `HEAD_SITES` may be of the
            last token alone, [1, n].
        gates: sites of the RG-LRU's gates where the engine has them behind the sigmoid only.
        dtypes: site → the dtype that the value was computed in, where it is not float32.
        state: the canonical state of batch 1 behind the tokens.
    """

    values: dict[str, np.ndarray]
    gates: dict[str, np.ndarray]
    dtypes: dict[str, str]
    state: State


class Observer(Protocol):
    """An engine that shows the values at its sites."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of tokens of one call that are worth a look, each another program or path.

        Such as a chunk and a single token; the longest first.
        """
        ...

    def observe(self, tokens: np.ndarray, state: State) -> Observation:
        """Takes tokens [T], T in `lengths`, from a canonical state of batch 1, in one call."""
        ...


def observed(found: dict[str, np.ndarray], state: State) -> Observation:
    """An observation of values as an engine has them, of one conversation.

    Args:
        found: site → [1, T, n] in the engine's dtype; it is emptied, as there may be a lot.
        state: the canonical state behind the tokens.
    """
    dtypes = {site: a.dtype.name for site, a in found.items() if a.dtype != np.float32}
    values = {}
    for site in tuple(found):
        values[site] = found.pop(site)[0].astype(np.float32, copy=False)
    return Observation(values=values, gates={}, dtypes=dtypes, state=state)
