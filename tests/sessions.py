"""What the tests of all engines do with a session."""

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.runtimes.session import Session


def random_tokens(config: GriffinConfig, batch: int, length: int) -> np.ndarray:
    """Token ids [batch, length], the same ones every time."""
    return np.random.default_rng(7).integers(0, config.vocab_size, (batch, length))


def ragged(session: Session, tokens: np.ndarray, sizes: list[int]) -> np.ndarray:
    """All logits, taking chunks of the given sizes in turn."""
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
