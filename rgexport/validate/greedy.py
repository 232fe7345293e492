"""What a session would go on with."""

import numpy as np

from rgexport.runtimes.session import Session


def most_likely(session: Session, logits: np.ndarray, count: int) -> np.ndarray:
    """The most likely tokens [count] after a state, whose last logits are [vocab]."""
    chosen = [int(logits.argmax())]
    while len(chosen) < count:
        chosen.append(int(session.step(np.array(chosen[-1:], np.int64))[0].argmax()))
    return np.array(chosen, np.int64)
