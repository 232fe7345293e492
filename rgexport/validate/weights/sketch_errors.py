"""An artifact's weights against sketches of those that they were made from.

This asks what the weight table asks (see `weight_errors`), except of single weights. The levels
that an artifact stores show its steps, and rounding to nearest on them makes an error of a known
size. Other weights are further away, however alike their logits are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.weights.expectations import EXPECTATIONS, expectation_key
from rgexport.validate.weights.sketch import SLAB_BYTES, SketchShape, sketch_shape, square_sum
from rgexport.validate.weights.steps import is_quantized, rows_together, shown_rounding
from rgexport.validate.weights.weight_errors import of_each_tensor, ratio

_KEPT = 2.0**-22
"""Relative error of a number in a sketch: float32, and four times as much for sums."""


@dataclass(frozen=True, kw_only=True)
class SketchError:
    """How far the stored Ŵ is from W, as estimated from a sketch of W.

    `relative_error`, `projection`, `noise`, `shift`, `weighted` and `chosen` are as
    in `weight_errors.WeightError`.

    Attributes:
        directions: products that are known of each row; None where the row itself is.
        expected_error: the relative error that rounding to nearest makes.
        worst_row: the noise of the row where it is largest.
        evenness: how many rows of equal shares would make up the expected error.
        largest_share: the share of the row that has most of it.
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
    chosen: str = "rtn"

    @property
    def values(self) -> int:
        """Weights in all."""
        return self.rows * self.columns

    @property
    def uncertainty(self) -> float:
        """The relative standard error of ‖W−Ŵ‖²."""
        return math.sqrt(2 / (self.evenness * self.directions)) if self.directions else 0.0


def sketch_errors(
    reference: ReferenceFile,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    *,
    weighted: bool = False,
) -> list[SketchError]:
    """Compares all `tensors` of an artifact, two at a time, in slabs.

    Args:
        reference: has sketches of the weights that the artifact should have been made from.
        dequantized: the artifact's own.
        tensors: how each of them is stored.
        weighted: whether the artifact was made with an importance matrix, or a calibration.
    """

    def measure(name: str, advance: Advance) -> SketchError:
        stored = tensors[name]
        found = _sums(name, reference.sketch(name), dequantized[name], stored, advance)
        return _summary(name, stored, found, reference.square(name), weighted)

    return of_each_tensor("Comparing weights with their sketches", tensors, measure)


@dataclass
class _Sums:
    """Sums over the rows of a tensor, and maxima."""

    error: float = 0.0
    expected: float = 0.0
    expected_square: float = 0.0
    moved: float = 0.0
    steps: float = 0.0
    square: float = 0.0
    worst_row: float = 0.0
    most_expected: float = 0.0


def _sums(
    name: str, sketch: np.ndarray, weights: RowTensor, stored: StoredTensor, advance: Advance
) -> _Sums:
    shape, total, first = sketch_shape(stored.shape), _Sums(), 0
    for rows in _slabs(weights, shape, rows_together(stored.scheme)):
        original = sketch[first : first + len(rows)].astype(np.float64)
        first += len(rows)
        with np.errstate(invalid="ignore", over="ignore"):
            delta = shape.project(rows) - original
            error, (rounding, steps) = shape.squares(delta), shown_rounding(name, rows, stored)
            expected = rounding + shape.squares(original * _KEPT)
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


def _summary(
    name: str, stored: StoredTensor, found: _Sums, original: float, weighted: bool
) -> SketchError:
    """`original` is Σ W²."""
    shape, scheme = sketch_shape(stored.shape), stored.scheme
    # ‖Ŵ‖² = ‖W‖² + 2⟨W,E⟩ + ‖E‖²: the norms tell ⟨W,E⟩ better than any product does.
    along = (found.square - original - found.error) / 2
    key = expectation_key(scheme, weighted)
    return SketchError(
        name=name,
        scheme=scheme.label,
        quantized=is_quantized(scheme),
        rows=shape.rows,
        columns=shape.columns,
        directions=shape.directions or None,
        relative_error=ratio(found.error, original) ** 0.5,
        expected_error=ratio(found.expected, original) ** 0.5,
        projection=1 + ratio(along, original),
        noise=ratio(found.error, found.expected),
        shift=ratio(found.moved, found.steps),
        worst_row=found.worst_row,
        evenness=ratio(found.expected**2, found.expected_square),
        largest_share=ratio(found.most_expected, found.expected),
        weighted=EXPECTATIONS[key].weighted,
        chosen=key,
    )
