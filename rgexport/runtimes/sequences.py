"""Checks of tokens and states that all engines share."""

from collections.abc import Iterator, Mapping

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State


def checked_tokens(tokens: np.ndarray, batch: int, vocab_size: int) -> np.ndarray:
    """Token ids as int64 [batch, T].

    Raises:
        RequestError: the shape is another, or an id is outside of the vocabulary.
    """
    tokens = np.asarray(tokens, np.int64)
    if tokens.ndim != 2 or len(tokens) != batch or not tokens.shape[1]:
        raise RequestError(f"tokens have shape {tokens.shape}; expected [{batch}, T], T ≥ 1")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        worst = tokens.max() if tokens.min() >= 0 else tokens.min()
        raise RequestError(f"token id {worst} is outside of the vocabulary of {vocab_size}")
    return tokens


def require_fitting(state: State, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a state of another model.

    Args:
        state: a canonical state of any batch size.
        shapes: name → shape without the batch axis, of all tensors but the position.

    Raises:
        RequestError: a name or shape does not fit.
    """
    complaints = list(_misfits(state, {**shapes, POSITION: ()}))
    if complaints:
        raise RequestError(f"this state is of another model: {'; '.join(complaints[:5])}")


def _misfits(state: State, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name in expected.keys() ^ state.keys():
        yield f"{name} is {'missing' if name in expected else 'unknown'}"
    batch = np.shape(state.get(POSITION, ()))[:1]
    for name in expected.keys() & state.keys():
        found = np.shape(state[name])
        if found != (*batch, *expected[name]):
            yield f"{name} has shape {found}; expected {(*batch, *expected[name])}"
