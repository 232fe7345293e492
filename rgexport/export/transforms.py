"""Transforms weights before they are stored, and back.

A graph need not compute these for every token: norms are stored as 1 + w, the RG-LRU's parameter as
the factor of its gate, -8 softplus(a_param).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.config import RG_LRU_C

Shape = tuple[int, ...]
_Values = Callable[[np.ndarray], np.ndarray]


def _same(rows: np.ndarray) -> np.ndarray:
    return rows


@dataclass(frozen=True)
class Transform:
    """Maps rows of a checkpoint to rows of the file; both are float32.

    `store` and `restore` take and return rows of the canonical shape; `shape` maps the canonical
    shape to the one in the file, of the same values in the same order.
    """

    store: _Values = _same
    restore: _Values = _same
    shape: Callable[[Shape], Shape] = lambda shape: shape


def _decay(a_param: np.ndarray) -> np.ndarray:
    """Returns -8 softplus(a_param), computed in float64."""
    p = a_param.astype(np.float64)
    softplus = np.log1p(np.exp(-np.abs(p))) + np.maximum(p, 0)
    return (RG_LRU_C * softplus).astype(np.float32)


def _a_param(decay: np.ndarray) -> np.ndarray:
    """Inverts softplus: log(exp(s) - 1) = s + log(1 - exp(-s))."""
    softplus = np.maximum(decay.astype(np.float64) / RG_LRU_C, np.finfo(np.float32).tiny)
    return (softplus + np.log(-np.expm1(-softplus))).astype(np.float32)


PLAIN = Transform()
NORM = Transform(lambda w: w + np.float32(1), lambda w: w - np.float32(1))
DECAY = Transform(_decay, _a_param)
