"""What a model expects of a text: the negative log likelihood of each token."""

import numpy as np

from rgexport.errors import RequestError
from rgexport.runtimes.session import Session
from rgexport.validate.measure import blocks


def losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """As `further_losses`, from the beginning on."""
    session.reset()
    return further_losses(session, tokens)


def further_losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Nats of tokens 1 … T - 1 of a text [T], float64 [T - 1], by the session's state.

    Afterwards the session has seen all but the last token.

    Raises:
        RequestError: the model gives NaN or infinite logits.
    """
    found = np.empty(len(tokens) - 1)
    for start, stop in blocks(session, [len(found)]):
        logits = session.prefill(tokens[None, start:stop], stop - start)
        found[start:stop] = nats(logits, tokens[None, start + 1 : stop + 1])[0]
    return found


def nats(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The negative log likelihood, float64 [R, T], of `tokens` [R, T] by logits [R, T, vocab]."""
    largest = logits.max(-1, keepdims=True)
    sums = np.exp(logits - largest).sum(-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0].astype(np.float64)
    found: np.ndarray = largest[..., 0] + np.log(sums) - chosen
    if not np.isfinite(found).all():
        raise RequestError(
            "the model's logits are NaN or infinite; check the artifact with `rgexport validate`"
        )
    return found
