"""Numerical functions of NumPy arrays that several packages share."""

import numpy as np


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """Returns log Σ exp(logits) over the last axis: float64 [...] of any floats [..., vocab].

    The exponentials have the precision of the logits; they are summed in float64.
    """
    # After subtraction of the largest logit, no exponential overflows.
    largest = logits.max(-1, keepdims=True)
    sums = np.exp(logits - largest).sum(-1, dtype=np.float64)
    result: np.ndarray = largest[..., 0] + np.log(sums)
    return result
