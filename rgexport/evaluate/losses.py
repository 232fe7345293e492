"""What a model expects of a text: the negative log likelihood of each token."""

import numpy as np

from rgexport.errors import RequestError
from rgexport.runtimes.session import Session

_LOGITS_BYTES = 64 << 20
"""Of the logits that are there at once."""


def losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Nats of tokens 1 … T - 1 of each row, float64 [R, T - 1], for a session of R rows.

    The states go on from where they are, and afterwards have seen all but the last token.

    Raises:
        RequestError: the model gives NaN or infinite logits.
    """
    rows, count = len(tokens), tokens.shape[1] - 1
    chunk = max(
        1, min(session.info.prefill_chunk, _LOGITS_BYTES // (4 * rows * session.vocab_size))
    )
    found = np.empty((rows, count))
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        logits = session.prefill(tokens[:, start:stop], stop - start)
        found[:, start:stop] = nats(logits, tokens[:, start + 1 : stop + 1])
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
