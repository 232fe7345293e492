"""Negative log-likelihoods of the tokens of a text."""

from collections.abc import Sequence

import numpy as np

from rgexport.errors import RequestError
from rgexport.evaluation.pieces import Result
from rgexport.runtimes.session import Session, blocks


def losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    session.reset()
    return further_losses(session, tokens)


def further_losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Returns the nats of tokens 1 … T - 1 of a text [T] after the session's state, float64 [T-1].

    The session reads all tokens but the last.
    """
    values = np.empty(len(tokens) - 1)
    for start, stop in blocks(session, [len(values)]):
        logits = session.prefill(tokens[None, start:stop], stop - start)
        values[start:stop] = nats(logits, tokens[None, start + 1 : stop + 1])[0]
    return values


def nats(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the negative log-likelihood, float64 [R, T], of tokens [R, T], logits [R, T, V]."""
    largest = logits.max(-1, keepdims=True)
    sums = np.exp(logits - largest).sum(-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0].astype(np.float64)
    values: np.ndarray = largest[..., 0] + np.log(sums) - chosen
    require_finite(values)
    return values


def require_finite(values: np.ndarray, name: str = "logits") -> None:
    if not np.isfinite(values).all():
        raise RequestError(
            f"the model's {name} are NaN or infinite; check the artifact with `rgexport validate`"
        )


def block_sums(values: np.ndarray, block: int) -> Result:
    """Returns the sums of blocks of losses, and the number of tokens in each."""
    starts = np.arange(0, len(values), block)
    counts = np.diff([*starts, len(values)])
    return {"sums": np.add.reduceat(values, starts).tolist(), "counts": counts.tolist()}


def joined(results: Sequence[Result]) -> tuple[list[float], list[int]]:
    """Returns the sums and counts of several `block_sums`, one after another."""
    return (
        [value for result in results for value in result["sums"]],
        [count for result in results for count in result["counts"]],
    )
