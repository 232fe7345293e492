"""Helpers for the tests of all engines."""

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.runtimes.session import Session


def random_tokens(config: GriffinConfig, batch: int, length: int) -> np.ndarray:
    """Token ids [batch, length], the same ones every time."""
    return np.random.default_rng(7).integers(0, config.vocab_size, (batch, length))


def ragged(session: Session, tokens: np.ndarray, sizes: list[int]) -> np.ndarray:
    """All logits, from chunks of the given sizes in turn."""
    logits: list[np.ndarray] = []
    start = 0
    while start < tokens.shape[1]:
        chunk = tokens[:, start : start + sizes[len(logits) % len(sizes)]]
        logits.append(session.prefill(chunk, chunk.shape[1]))
        start += chunk.shape[1]
    return np.concatenate(logits, axis=1)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest expected value."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_refusals(session: Session) -> None:
    """Refusals of every session, for the model `ODD_CONFIGS["regular"]`."""
    with pytest.raises(RequestError, match="256 is outside of the vocabulary"):
        session.prefill(np.array([[3, 256]]))
    with pytest.raises(RequestError, match=r"expected \[1, T\]"):
        session.prefill(np.zeros((2, 3), np.int64))
    state = session.get_state()
    del state["layers.0.rg_lru"]
    with pytest.raises(RequestError, match=r"layers.0.rg_lru is missing"):
        session.set_state(state)
    with pytest.raises(RequestError, match=r"layers.0.conv1d has shape"):
        session.set_state(session.get_state() | {"layers.0.conv1d": np.zeros((1, 2, 64))})
