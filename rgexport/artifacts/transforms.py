"""Maps weights of the model to the values that a file stores, and back."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.config import RG_LRU_C

Shape = tuple[int, ...]
_Values = Callable[[np.ndarray], np.ndarray]


def _unchanged(rows: np.ndarray) -> np.ndarray:
    return rows


def _same_shape(shape: Shape) -> Shape:
    return shape


@dataclass(frozen=True)
class Transform:
    """A mapping between float32 rows of a checkpoint and rows of a file.

    Attributes:
        store: maps rows of the checkpoint to rows of the file.
        restore: maps rows of the file back to rows of the checkpoint.
        shape: maps the canonical shape of the tensor to its shape in the file.
    """

    store: _Values = _unchanged
    restore: _Values = _unchanged
    shape: Callable[[Shape], Shape] = _same_shape


def _plus_one(weight: np.ndarray) -> np.ndarray:
    return weight + np.float32(1)


def _minus_one(weight: np.ndarray) -> np.ndarray:
    return weight - np.float32(1)


def _decay(a_param: np.ndarray) -> np.ndarray:
    """Returns c · softplus(a_param), which the RG-LRU multiplies with its gate.

    The softplus is log(1 + exp(p)) = log(1 + exp(-|p|)) + max(p, 0), which cannot overflow.
    """
    p = a_param.astype(np.float64)
    softplus = np.log1p(np.exp(-np.abs(p))) + np.maximum(p, 0)
    return (RG_LRU_C * softplus).astype(np.float32)


def _a_param(decay: np.ndarray) -> np.ndarray:
    """Inverts `_decay`: log(exp(s) - 1) = s + log(1 - exp(-s))."""
    softplus = np.maximum(decay.astype(np.float64) / RG_LRU_C, np.finfo(np.float32).tiny)
    return (softplus + np.log(-np.expm1(-softplus))).astype(np.float32)


PLAIN = Transform()
"""Stores a tensor as it is."""

NORM = Transform(_plus_one, _minus_one)
"""Stores the factor of an RMSNorm, which is 1 + weight."""

DECAY = Transform(_decay, _a_param)
"""Stores the RG-LRU's decay in place of its parameter `a_param`."""
