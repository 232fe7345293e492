"""Negative log-likelihoods of the tokens of a text."""

from collections.abc import Sequence

import numpy as np

from rgexport.errors import RequestError
from rgexport.evaluation.pieces import Result
from rgexport.numerics import log_sum_exp
from rgexport.runtimes.session import Session, blocks


def losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Resets the session and returns `further_losses` of a text [T], float64 [T - 1]."""
    session.reset()
    return further_losses(session, tokens)


def further_losses(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Returns the nats of tokens 1 … T - 1 of a text [T] after the session's state, float64 [T-1].

    The session reads all tokens but the last.
    """
    values = np.empty(len(tokens) - 1)
    for start, stop in blocks(session, [len(values)]):
        logits = session.prefill(tokens[None, start:stop], stop - start)
        targets = tokens[None, start + 1 : stop + 1]
        values[start:stop] = nats(logits, targets)[0]
    return values


def nats(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the negative log-likelihood, float64 [R, T], of tokens [R, T], logits [R, T, V].

    Raises:
        RequestError: a loss is NaN or infinite.
    """
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    values: np.ndarray = log_sum_exp(logits) - chosen.astype(np.float64)
    require_finite(values)
    return values


def require_finite(values: np.ndarray, name: str = "logits") -> None:
    """Raises RequestError if a value of the model is NaN or infinite; `name` says which it is."""
    if not np.isfinite(values).all():
        raise RequestError(
            f"the model's {name} are NaN or infinite; check the artifact with `rgexport validate`"
        )


def block_sums(values: np.ndarray, block: int) -> Result:
    """Returns the sums of blocks of losses, and the number of tokens in each."""
    starts = np.arange(0, len(values), block)
    sums = np.add.reduceat(values, starts)
    counts = np.diff([*starts, len(values)])
    return {"sums": sums.tolist(), "counts": counts.tolist()}


def joined(results: Sequence[Result]) -> tuple[list[float], list[int]]:
    """Returns the sums and counts of several `block_sums`, one after another."""
    sums: list[float] = []
    counts: list[int] = []
    for result in results:
        sums += result["sums"]
        counts += result["counts"]
    return sums, counts
