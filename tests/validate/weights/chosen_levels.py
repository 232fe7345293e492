"""What algorithms other than rounding to nearest store, written down from their definitions."""

import numpy as np

from rgexport.quantize.scheme import Affine

FRACTIONS = np.append(np.linspace(0.5, 1.12, 32), 1.0)
"""Of the scale of the extremes."""
Grid = tuple[np.ndarray, np.ndarray]
"""The scale and the zero point of each weight."""


def searched(
    w: np.ndarray, scheme: Affine, importance: np.ndarray | None = None
) -> tuple[np.ndarray, Grid]:
    """Ŵ, and its grid: of each block, the candidate with the least squared error."""
    importance = np.ones(w.shape[1]) if importance is None else importance
    size = scheme.block or w.shape[1]
    found, scales, zeros = (np.empty(w.shape) for _ in range(3))
    for start in range(0, w.shape[1], size):
        own = np.s_[:, start : start + size]
        least = np.full(len(w), np.inf)
        for scale, zero in _candidates(w[own].astype(np.float64), scheme):
            stored = _nearest(w[own], scale, zero, scheme)
            error = np.square(stored - w[own]) @ importance[start : start + size]
            better = error < least
            least[better] = error[better]
            for kept, new in ((found, stored), (scales, scale), (zeros, zero)):
                kept[own] = np.where(better[:, None], new, kept[own])
    return found.astype(np.float32), (scales, zeros)


def fed_back(w: np.ndarray, scheme: Affine, hessian: np.ndarray) -> np.ndarray:
    """Ŵ by GPTQ: on the grid of a search, each column makes up for the errors before it.

    The Hessian is damped, and its outside of the diagonal shrunk by three tenths.
    """
    _, (scales, zeros) = searched(w, scheme, np.diag(hessian))
    own = np.diag(hessian)
    damped = 0.7 * hessian + np.diag(0.3 * own + 0.01 * own.mean())
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    rest, stored = w.astype(np.float64), np.empty(w.shape)
    for j in range(w.shape[1]):
        column = np.s_[:, j : j + 1]
        stored[column] = _nearest(rest[column], scales[column], zeros[column], scheme)
        error = (rest[column] - stored[column]) / factor[j, j]
        rest[:, j:] -= error * factor[j, j:]
    return stored.astype(np.float32)


def hessian(columns: int, seed: int = 0) -> np.ndarray:
    """Of correlated inputs, whose mean squares differ by two orders of magnitude."""
    rng = np.random.default_rng(seed)
    mix = np.eye(columns) + rng.standard_normal((columns, columns)) / columns**0.5
    x = rng.standard_normal((4 * columns, columns)) @ mix * rng.lognormal(sigma=0.5, size=columns)
    return np.asarray(x.T @ x / len(x))


def _nearest(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: Affine) -> np.ndarray:
    levels = np.clip(np.rint(w / scale) + zero, 0, 2**scheme.bits - 1)
    return np.asarray((levels - zero) * scale)


def _candidates(w: np.ndarray, scheme: Affine) -> list[Grid]:
    """Scales and zero points [n, 1] for blocks [n, size]."""
    high, low = np.maximum(w.max(1), 0), np.minimum(w.min(1), 0)
    levels = 2**scheme.bits - 1
    if scheme.symmetric:
        zero = np.full((len(w), 1), 2.0 ** (scheme.bits - 1))
        largest = np.maximum(high, -low) / zero[0, 0]
        return [(_kept(sign * f * largest, scheme), zero) for f in FRACTIONS for sign in (1, -1)]
    found = []
    for f in FRACTIONS:
        scale = _kept(f * (high - low) / levels, scheme)
        zero = np.rint(levels / 2 - (high + low)[:, None] / (2 * scale))
        plain = np.rint(-low[:, None] / scale)
        found.extend((scale, np.clip(one, 0, levels)) for one in (zero - 1, zero, zero + 1, plain))
    return found


def _kept(scales: np.ndarray, scheme: Affine) -> np.ndarray:
    stored = scales.astype(scheme.scale).astype(np.float64)[:, None]
    return np.asarray(np.where(stored == 0, 1.0, stored))
