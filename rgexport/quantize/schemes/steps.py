"""Step sizes: the distance between neighbouring values that a scheme can store, at each weight."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Measure = Literal["weight", "block", "row", "group"]
"""The unit whose error an algorithm bounds: single weights, or root mean squares."""
NEGLIGIBLE = np.float32(2.0**-100)
"""Least step of integers: weights below it may be stored as zeros."""


@dataclass(frozen=True)
class StepSizes:
    """The units of the errors of the weights [rows, columns] of a slab.

    `step` is at each weight, or of each span where there are `spans` (their first columns), [rows
    or groups, spans]. `distance` is of levels, or of each row, [rows, 1]; None where it is `step`.
    `limit` is the magnitude beyond which a weight may be stored as the outermost level, `grid` the
    distance of levels before scales are rounded; None where neither applies.
    """

    step: np.ndarray
    distance: np.ndarray | None = None
    limit: np.ndarray | None = None
    grid: np.ndarray | None = None
    spans: np.ndarray | None = None

    def without_clipping(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Subtracts the error beyond the outermost levels, on the side with the smaller error."""
        if self.limit is None:
            return error
        return _smaller(error, error + (w - np.clip(w, -self.limit, self.limit)))

    def beyond_rounding(self, error: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Subtracts the error of rounding to nearest, clipped or not, which large weights bias."""
        if self.grid is None:
            return self.without_clipping(error, w)
        nearest = np.rint(w / self.grid) * self.grid
        rest = error - (nearest - w)
        if self.limit is None:
            return rest
        return _smaller(rest, error - (np.clip(nearest, -self.limit, self.limit) - w))

    def rounding(self, columns: int, squares: np.ndarray | None = None) -> np.ndarray:
        """Returns Σ step²/12 of each row, [rows] float64, weighed by `squares` [columns]."""
        steps = np.square(self.levels, dtype=np.float64)
        if squares is None:
            return steps.sum(1) * (columns / steps.shape[1] / 12)
        if steps.shape[1] == 1:
            return steps[:, 0] * (squares.sum() / 12)
        return np.asarray(np.einsum("nk,k->n", steps, squares / 12))

    def total(self, columns: int) -> float:
        levels = self.levels
        return float(levels.sum(dtype=np.float64)) * columns / levels.shape[1]

    @property
    def levels(self) -> np.ndarray:
        """The distance of levels at each weight, or one number for each row, [rows, 1]."""
        return self.step if self.distance is None else self.distance

    def largest(self, error: np.ndarray) -> float:
        """Returns the largest error in steps: of a weight, or the root mean square of a span."""
        if self.spans is not None:
            error = _root_mean_squares(error, self.spans, len(error) // max(1, len(self.step)))
        return float((np.abs(error) / self.step).max(initial=0))


def span_steps(
    error: np.ndarray, moved: np.ndarray, spans: np.ndarray, levels: np.ndarray
) -> StepSizes:
    """Returns twice the root mean square of rounding to nearest, for each row or block.

    `error` [rows, columns] is that of rounding, `moved` [rows, blocks] how far rounded scales move
    levels, `levels` the `StepSizes.distance`.
    """
    step = 2 * (_root_mean_squares(error, spans) + moved.max(1, keepdims=True))
    return StepSizes(np.maximum(step, NEGLIGIBLE), distance=levels, spans=spans)


def float_steps(w: np.ndarray, digits: int, smallest: float) -> np.ndarray:
    """Returns the distance of floats with so many binary digits after the point, at each weight."""
    # frexp: |w| = m · 2^e with m in [0.5, 1), where the floats are 2^(e - 1 - digits) apart.
    exponent = np.frexp(w)[1] - (1 + digits)
    return np.maximum(np.ldexp(np.float32(1), exponent), np.float32(smallest))


def float16_spacing(values: np.ndarray) -> np.ndarray:
    """Returns at least the distance between float16s around positive values."""
    return np.maximum(values * values.dtype.type(2.0**-10), values.dtype.type(2.0**-24))


def _root_mean_squares(error: np.ndarray, spans: np.ndarray, rows: int = 1) -> np.ndarray:
    """Root mean squares of groups of `rows`, within each span of columns: [groups, spans]."""
    squares = np.square(error, dtype=np.float64)
    counts = rows * np.diff(spans, append=error.shape[1])
    sums = np.add.reduceat(squares, spans, axis=1)
    return np.asarray(np.sqrt(sums.reshape(len(error) // rows, rows, len(spans)).sum(1) / counts))


def _smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.abs(b) < np.abs(a), b, a)
