"""An artifact's weights against sketches of those that they were made from.

What is asked is what the weight table asks (see `weight_errors`), but for the single weight: the
levels that an artifact stores show its steps, and rounding to nearest on them makes an error of a
known size. Other weights are further away, however alike their logits are.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import task
from rgexport.validate.weights.sketch import SLAB_BYTES, SketchShape, sketch_shape, square_sum
from rgexport.validate.weights.steps import (
    is_quantized,
    is_weighted,
    rows_together,
    shown_rounding,
)
from rgexport.validate.weights.weight_errors import THREADS, ratio

_KEPT = 2.0**-22
"""Relative error of a number in a sketch: float32, and four times as much for sums."""


class Sketches(Protocol):
    """What is needed of `reference_file.ReferenceFile`."""

    def sketch(self, name: str) -> np.ndarray:
        """Of a tensor, [rows, width] float32."""
        ...

    def square(self, name: str) -> float:
        """Σ W² of a tensor."""
        ...


@dataclass(frozen=True, kw_only=True)
class SketchError:
    """What a sketch of W tells of the stored Ŵ.

    relative_error, projection, noise, shift: as in `weight_errors.WeightError`; expected_error:
    the relative error that rounding to nearest makes; worst_row: the noise of the row where it is
    largest. Each row is known from so many `directions`; where that is None, as it is.
    evenness: the number of rows that would make up the expected error if all had the same share,
    and largest_share that of the row that has most of it; weighted: as there.
    """

    name: str
    scheme: str
    quantized: bool
    rows: int
    columns: int
    directions: int | None
    relative_error: float
    expected_error: float
    projection: float
    noise: float
    shift: float
    worst_row: float
    evenness: float
    largest_share: float
    weighted: bool

    @property
    def values(self) -> int:
        """Weights in all."""
        return self.rows * self.columns

    @property
    def uncertainty(self) -> float:
        """The relative standard error of ‖W−Ŵ‖²."""
        return math.sqrt(2 / (self.evenness * self.directions)) if self.directions else 0.0


def sketch_errors(
    sketches: Sketches,
    stored_weights: WeightSource,
    tensors: Mapping[str, StoredTensor],
    *,
    weighted: bool = False,
) -> list[SketchError]:
    """Compares all `tensors` of an artifact, two at a time, in slabs.

    Args:
        sketches: of the weights that the artifact should have been made from.
        stored_weights: the artifact's, dequantized.
        tensors: how each of them is stored.
        weighted: whether an importance matrix had a say.
    """
    total = sum(4 * math.prod(stored.shape) for stored in tensors.values())
    with (
        task("Comparing weights with their sketches", total) as advance,
        ThreadPoolExecutor(THREADS) as pool,
    ):

        def measure(name: str) -> SketchError:
            found = _sums(name, sketches.sketch(name), stored_weights[name], tensors[name], advance)
            return found.summary(name, tensors[name], sketches.square(name), weighted)

        return list(pool.map(measure, tensors))


@dataclass
class _Sums:
    """What is added up over the rows of a tensor."""

    error: float = 0.0
    expected: float = 0.0
    moved: float = 0.0
    steps: float = 0.0
    square: float = 0.0
    worst_row: float = 0.0
    expected_square: float = 0.0
    most_expected: float = 0.0

    def summary(
        self, name: str, stored: StoredTensor, original: float, weighted: bool
    ) -> SketchError:
        """All of it; `original` is Σ W²."""
        shape = sketch_shape(stored.shape)
        # ‖Ŵ‖² = ‖W‖² + 2⟨W,E⟩ + ‖E‖²: the norms tell ⟨W,E⟩ better than any product does.
        along = (self.square - original - self.error) / 2
        return SketchError(
            name=name,
            scheme=stored.scheme.label,
            quantized=is_quantized(stored.scheme),
            rows=shape.rows,
            columns=shape.columns,
            directions=shape.directions or None,
            relative_error=ratio(self.error, original) ** 0.5,
            expected_error=ratio(self.expected, original) ** 0.5,
            projection=1 + ratio(along, original),
            noise=ratio(self.error, self.expected),
            shift=ratio(self.moved, self.steps),
            worst_row=self.worst_row,
            evenness=ratio(self.expected**2, self.expected_square),
            largest_share=ratio(self.most_expected, self.expected),
            weighted=is_weighted(stored.scheme, weighted),
        )


def _sums(
    name: str,
    sketch: np.ndarray,
    weights: RowTensor,
    stored: StoredTensor,
    advance: Callable[[int], None],
) -> _Sums:
    shape, total, first = sketch_shape(stored.shape), _Sums(), 0
    for rows in _slabs(weights, shape, rows_together(stored.scheme)):
        expected_sketch = sketch[first : first + len(rows)].astype(np.float64)
        first += len(rows)
        with np.errstate(invalid="ignore", over="ignore"):
            delta = shape.project(rows) - expected_sketch
            error, (rounding, steps) = shape.squares(delta), shown_rounding(name, rows, stored)
            expected = rounding + shape.squares(expected_sketch * _KEPT)
            shares = np.divide(error, expected, out=np.zeros_like(error), where=error != 0)
            total.worst_row = float(np.maximum(total.worst_row, shares.max()))
        total.error += float(error.sum())
        total.expected += float(expected.sum())
        total.expected_square += float(np.square(expected).sum())
        total.most_expected = max(total.most_expected, float(expected.max()))
        total.moved += float(shape.sums(delta).sum())
        total.steps += steps
        total.square += square_sum(rows)
        advance(rows.nbytes)
    return total


def _slabs(weights: RowTensor, shape: SketchShape, together: int) -> Iterator[np.ndarray]:
    """The tensor's rows [n, columns] float32, as its sketch has them."""
    row_bytes = 4 * math.prod(weights.shape[1:])
    for start, stop in slab_bounds(weights.shape[0], row_bytes, SLAB_BYTES, together):
        rows = weights.read(start, stop).astype(np.float32, copy=False)
        yield rows.reshape(-1, shape.columns)
