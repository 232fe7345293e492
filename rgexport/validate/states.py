"""Errors of canonical states."""

from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np

from rgexport.griffin.state import POSITION, State

FIRST_CHECKPOINT = 64
RECENT = 64
"""Tokens per checkpoint with compared keys and values."""


@dataclass(frozen=True, kw_only=True)
class StateError:
    """One state tensor: max |Δ| / max |reference| and ‖Δ‖ / ‖reference‖, in float64.

    Where the reference is all zeros, max |Δ| and ‖Δ‖.
    """

    name: str
    relative_max: float
    relative_norm: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The states after `position` tokens of a text; of caches only what `recent` keeps."""

    position: int
    states: list[StateError]


def state_errors(reference: State, candidate: State) -> list[StateError]:
    """Compares all tensors except the position, in the reference's order.

    Tensors whose shapes differ, as those of another window do, are left out.
    """
    return [
        _error(name, array.astype(np.float64), candidate[name])
        for name, array in reference.items()
        if name != POSITION and array.shape == candidate[name].shape
    ]


def _error(name: str, reference: np.ndarray, candidate: np.ndarray) -> StateError:
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(candidate.astype(np.float64) - reference)
        return StateError(
            name=name,
            relative_max=float(delta.max() / (np.abs(reference).max() or 1)),
            relative_norm=float(np.linalg.norm(delta) / (np.linalg.norm(reference) or 1)),
        )


def recent(state: State) -> State:
    """A copy with the keys and values of the last `RECENT` tokens: a 2B's windows take 33 MB."""
    return {
        name: (array[:, -RECENT:] if name.endswith((".key", ".value")) else array).copy()
        for name, array in state.items()
    }


def checkpoints(length: int) -> list[int]:
    """Positions inside a text of so many tokens where states are compared: 64, 128, 256, …"""
    doubled = (FIRST_CHECKPOINT << n for n in count())
    return list(takewhile(lambda position: position < length, doubled))


def worst(errors: list[StateError]) -> float:
    """The largest `relative_max`; NaN if there is one; 0 for a model without states."""
    return float(np.max([error.relative_max for error in errors], initial=0))
