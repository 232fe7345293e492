"""How far one canonical state is from another."""

from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import POSITION, State

FIRST_CHECKPOINT = 64
RECENT = 64
"""Tokens whose keys and values are compared at a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StateError:
    """One state tensor: max |Δ| / max |reference| and ‖Δ‖ / ‖reference‖, in float64.

    Where the reference is all zeros, the absolute values.
    """

    name: str
    relative_max: float
    relative_norm: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The states behind so many tokens of a text, but of the caches only what is `recent`."""

    position: int
    states: list[StateError]


def state_errors(reference: State, candidate: State) -> list[StateError]:
    """Compares all tensors but the position, in the reference's order.

    A tensor of another shape is left out: a reference with another window has such.
    """
    return [
        _error(name, array, candidate[name])
        for name, array in reference.items()
        if name != POSITION and array.shape == candidate[name].shape
    ]


def recent(state: State) -> State:
    """A copy with the keys and values of the last `RECENT` tokens: a 2B's windows take 33 MB."""
    return {
        name: (array[:, -RECENT:] if name.endswith((".key", ".value")) else array).copy()
        for name, array in state.items()
    }


def checkpoints(length: int) -> list[int]:
    """Positions inside a text of so many tokens where states are compared: 64, 128, 256, …"""
    found = []
    position = FIRST_CHECKPOINT
    while position < length:
        found.append(position)
        position *= 2
    return found


def worst(errors: list[StateError]) -> float:
    """The largest `relative_max`; NaN if there is one; 0 for a model without states."""
    return float(np.max([error.relative_max for error in errors], initial=0))


def _error(name: str, reference: np.ndarray, candidate: np.ndarray) -> StateError:
    ref = reference.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(candidate.astype(np.float64) - ref)
        return StateError(
            name=name,
            relative_max=float(delta.max() / (np.abs(ref).max() or 1)),
            relative_norm=float(np.linalg.norm(delta) / (np.linalg.norm(ref) or 1)),
        )
