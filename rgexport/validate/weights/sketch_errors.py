"""An artifact's weights against sketches of those that they were made from.

This asks what the weight table asks (see `weight_errors`), except of single weights. The levels
that an artifact stores show its steps, and rounding to nearest on them makes an error of a known
size. Other weights are further away, however alike their logits are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.export.row_groups import StoredGroup, groups_of
from rgexport.griffin.layout import input_site
from rgexport.griffin.tensor import RowTensor, WeightSource, slab_bounds
from rgexport.progress import Advance
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.weights.expectations import EXPECTATIONS, expectation_key
from rgexport.validate.weights.input_mixtures import expected_noise, mixed
from rgexport.validate.weights.sketch import SLAB_BYTES, SketchShape, sketch_shape, square_sum
from rgexport.validate.weights.steps import shown_steps
from rgexport.validate.weights.weight_errors import of_each_tensor, ratio

_KEPT = 2.0**-22
"""Relative error of a number in a sketch: float32, and four times as much for sums."""


@dataclass(frozen=True, kw_only=True)
class SketchError:
    """How far the stored Ŵ is from W, as estimated from a sketch of W.

    `relative_error`, `projection`, `noise`, `shift`, `output_noise`, `weighted` and `chosen` are
    as in `weight_errors.WeightError`.

    Attributes:
        directions: products that are known of each row; None where the row itself is.
        expected_error: the relative error that rounding to nearest makes.
        worst_row: the noise of the row where it is largest.
        evenness: how many rows of equal shares would make up the expected error.
        largest_share: the share of the row that has most of it.
        estimated: whether the projection and ‖W‖ are estimates from the sketch, as they are of
            row groups: the file has only the norm of the whole tensor.
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
    output_noise: float | None
    worst_row: float
    evenness: float
    largest_share: float
    weighted: bool
    estimated: bool = False
    chosen: str = "rtn"

    @property
    def values(self) -> int:
        """Weights in all."""
        return self.rows * self.columns

    @property
    def uncertainty(self) -> float:
        """The relative standard error of ‖W−Ŵ‖²."""
        return math.sqrt(2 / (self.evenness * self.directions)) if self.directions else 0.0

    @property
    def products(self) -> float:
        """The number of independent products of W and W−Ŵ that the projection is known from."""
        if self.estimated and self.directions:
            return self.evenness * self.directions
        return self.values


def sketch_errors(
    reference: ReferenceFile,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    *,
    weighted: bool = False,
) -> list[SketchError]:
    """Compares all `tensors` of an artifact, two at a time, in slabs.

    A tensor in row groups has an error for each.

    Args:
        reference: has sketches of the weights that the artifact should have been made from.
        dequantized: the artifact's own.
        tensors: how each of them is stored.
        weighted: whether the artifact was made with an importance matrix, or a calibration.
    """

    def measure(name: str, advance: Advance) -> list[SketchError]:
        return _errors(name, reference, dequantized[name], tensors[name], weighted, advance)

    found = of_each_tensor("Comparing weights with their sketches", tensors, measure)
    return list(chain.from_iterable(found))


@dataclass(frozen=True)
class _KnownOutputs:
    """Mixtures [m, K] of a linear's inputs, and the original's outputs [rows, m] for them."""

    mixtures: np.ndarray
    outputs: np.ndarray

    def of_rows(self, rows: slice | np.ndarray) -> "_KnownOutputs":
        """The same for some of the rows, a mask or indices."""
        return _KnownOutputs(self.mixtures, self.outputs[rows])


@dataclass
class _Sums:
    """Sums over rows that are stored by one scheme, and maxima."""

    error: float = 0.0
    expected: float = 0.0
    expected_square: float = 0.0
    moved: float = 0.0
    steps: float = 0.0
    square: float = 0.0
    worst_row: float = 0.0
    most_expected: float = 0.0
    original: float = 0.0
    along: float = 0.0
    output: float = 0.0
    expected_output: float = 0.0

    def add(
        self,
        rows: np.ndarray,
        original: np.ndarray,
        shape: SketchShape,
        name: str,
        stored: StoredTensor,
        known: _KnownOutputs | None,
    ) -> None:
        """Adds rows of the stored weights, and what is known of the same rows of the original."""
        with np.errstate(invalid="ignore", over="ignore"):
            delta, steps = shape.project(rows) - original, shown_steps(name, rows, stored)
            error = shape.squares(delta)
            expected = steps.rounding(shape.columns) + shape.squares(original * _KEPT)
            shares = np.divide(error, expected, out=np.zeros_like(error), where=error != 0)
            self.worst_row = float(np.maximum(self.worst_row, shares.max()))
            self.original += float(shape.squares(original).sum())
            self.along += float(shape.products(original, delta).sum())
        self.error += float(error.sum())
        self.expected += float(expected.sum())
        self.expected_square += float(np.square(expected).sum())
        self.most_expected = max(self.most_expected, float(expected.max()))
        self.moved += float(shape.sums(delta).sum())
        if known is not None:
            moved = mixed(rows, known.mixtures) - known.outputs
            self.output += float(np.square(moved).sum())
            self.expected_output += expected_noise(steps, known.mixtures)
        self.steps += steps.total(shape.columns)
        self.square += square_sum(rows)

    def use_square(self, original: float) -> None:
        """Uses the known Σ W² of the rows.

        ‖Ŵ‖² = ‖W‖² + 2⟨W,E⟩ + ‖E‖²: the norms tell ⟨W,E⟩ better than any product does.
        """
        self.original, self.along = original, (self.square - original - self.error) / 2


def _errors(
    name: str,
    reference: ReferenceFile,
    weights: RowTensor,
    stored: StoredTensor,
    weighted: bool,
    advance: Advance,
) -> list[SketchError]:
    """One error for each row group."""
    shape, sketch, groups = sketch_shape(stored.shape), reference.sketch(name), groups_of(stored)
    known = _known_outputs(name, reference, stored)
    sums, first = [_Sums() for _ in groups], 0
    for rows in _slabs(weights, shape, stored.scheme.rows_together):
        stop = first + len(rows)
        original = sketch[first:stop].astype(np.float64)
        for group, total in zip(groups, sums, strict=True):
            chosen = group.chosen(first, stop)
            if len(some := rows[chosen]):
                outputs = known and known.of_rows(slice(first, stop)).of_rows(chosen)
                total.add(some, original[chosen], shape, name, group.stored, outputs)
        first = stop
        advance(rows.nbytes)
    if len(groups) == 1:
        sums[0].use_square(reference.square(name))
    return [
        _summary(name, group, shape, total, weighted)
        for group, total in zip(groups, sums, strict=True)
    ]


def _known_outputs(
    name: str, reference: ReferenceFile, stored: StoredTensor
) -> _KnownOutputs | None:
    """What a file has of a quantized linear; None for all other tensors."""
    site = input_site(name)
    if site is None or not stored.scheme.is_quantized:
        return None
    return _KnownOutputs(reference.inputs(site), reference.outputs(name))


def _slabs(weights: RowTensor, shape: SketchShape, together: int) -> Iterator[np.ndarray]:
    """The tensor's rows [n, columns] float32, as its sketch has them."""
    row_bytes = 4 * math.prod(weights.shape[1:])
    for start, stop in slab_bounds(weights.shape[0], row_bytes, SLAB_BYTES, together):
        rows = weights.read(start, stop).astype(np.float32, copy=False)
        yield rows.reshape(-1, shape.columns)


def _summary(
    name: str, group: StoredGroup, shape: SketchShape, found: _Sums, weighted: bool
) -> SketchError:
    scheme = group.stored.uniform
    key = expectation_key(scheme, weighted)
    is_linear = input_site(name) is not None and scheme.is_quantized
    return SketchError(
        name=name,
        scheme=group.label,
        quantized=scheme.is_quantized,
        rows=len(group.rows) if group.rows is not None else shape.rows,
        columns=shape.columns,
        directions=shape.directions or None,
        relative_error=ratio(found.error, found.original) ** 0.5,
        expected_error=ratio(found.expected, found.original) ** 0.5,
        projection=1 + ratio(found.along, found.original),
        noise=ratio(found.error, found.expected),
        shift=ratio(found.moved, found.steps),
        output_noise=ratio(found.output, found.expected_output) if is_linear else None,
        worst_row=found.worst_row,
        evenness=ratio(found.expected**2, found.expected_square),
        largest_share=ratio(found.most_expected, found.expected),
        weighted=EXPECTATIONS[key].weighted,
        estimated=group.rows is not None,
        chosen=key,
    )
