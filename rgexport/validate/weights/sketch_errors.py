"""Errors of stored weights against the sketches of the original's in a reference file."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.storage import StoredGroup
from rgexport.griffin.layout import input_site
from rgexport.griffin.tensor import RowTensor, WeightSource, from_array
from rgexport.quantize.schemes.registry import Scheme, Uniform
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.weights import sketch
from rgexport.validate.weights.steps import shown_steps
from rgexport.validate.weights.tensor_errors import (
    Sums,
    TensorComparison,
    TensorError,
    output_sums,
    ratio,
    shared_fields,
)

_SKETCH_PRECISION = 2.0**-22
"""Relative error of a number in a sketch: that of float32, and four times as much for sums."""


@dataclass(frozen=True, kw_only=True)
class SketchError(TensorError):
    """The stored tensor Ŵ against a sketch of the original W; see `WeightError` for common fields.

    `directions` counts the products that are known of each row; null where the row itself is.
    `expected_error` is the relative error that rounding to nearest makes, `evenness` how many rows
    of equal shares would make it up, `largest_share` that of the row with most of it. Of row
    groups, the projection and the relative errors are `estimated`, with W without its mean row: few
    directions do not tell how long the part is that all rows have in common.
    """

    columns: int
    directions: int | None
    expected_error: float
    worst_row: float
    evenness: float
    largest_share: float
    estimated: bool = False


def sketch_errors(
    reference: ReferenceFile,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    weighted: bool = False,
) -> list[SketchError]:
    """Compares all `tensors` of an artifact with a file's sketches; see `weight_errors`."""
    comparison = _SketchComparison(reference, tensors, weighted)
    return comparison.compare("Comparing weights with their sketches", dequantized, tensors)


class _SketchComparison(TensorComparison[SketchError]):
    """A comparison with sketches; the rows that it knows are a sketch and, of linears, outputs."""

    def __init__(
        self, reference: ReferenceFile, tensors: Mapping[str, StoredTensor], weighted: bool
    ):
        self._reference = reference
        self._tensors = tensors
        self._weighted = weighted
        self._array = functools.cache(reference.array)
        self._mean_row = functools.cache(self._read_mean_row)

    def original(self, name: str) -> RowTensor:
        stored = self._tensors[name]
        known = self._reference.array(f"weights.{name}")
        if _known_site(name, stored.scheme) is not None:
            known = np.hstack([known, self._reference.array(f"outputs.{name}")])
        return from_array(known.reshape(stored.shape[0], -1, known.shape[1]))

    def measure(
        self, name: str, scheme: Uniform, original_rows: np.ndarray, rows: np.ndarray
    ) -> Sums:
        shape = sketch.sketch_shape(self._tensors[name].shape)
        w = original_rows[:, : shape.width].astype(np.float64)
        outputs = original_rows[:, shape.width :]
        delta = shape.project(rows) - w
        steps = shown_steps(name, rows, scheme)

        error = shape.dots(delta, delta)
        sketch_error = w * _SKETCH_PRECISION
        expected = steps.rounding(shape.columns) + shape.dots(sketch_error, sketch_error)
        row_noise = np.divide(error, expected, out=np.zeros_like(error), where=error != 0)
        varied = w
        if shape.directions:
            varied = w - self._mean_row(name)
        sums = {
            "worst_row": float(row_noise.max()),
            "square": float(shape.dots(varied, varied).sum()),
            "along": float(shape.dots(varied, delta).sum()),
            "error": float(error.sum()),
            "expected": float(expected.sum()),
            "expected_square": float(np.square(expected).sum()),
            "most_expected": float(expected.max()),
            "moved": float(shape.sums(delta).sum()),
            "steps": steps.total(shape.columns),
            "stored_square": sketch.square_sum(rows),
        }

        site = _known_site(name, scheme)
        if site is not None:
            mixtures = self._array(f"inputs.{site}")
            moved = sketch.products(rows, mixtures) - outputs
            sums |= output_sums(moved, steps, mixtures)
        return sums

    def summarize(self, name: str, group: StoredGroup, sums: Sums) -> SketchError:
        shape = sketch.sketch_shape(self._tensors[name].shape)
        estimated = group.rows is not None
        if not estimated:
            # ‖Ŵ‖² = ‖W‖² + 2⟨W,E⟩ + ‖E‖²: the norms tell ⟨W,E⟩ better than any product does.
            sums["square"] = self._reference.square(name)
            sums["along"] = (sums["stored_square"] - sums["square"] - sums["error"]) / 2
        return SketchError(
            **shared_fields(name, group, self._weighted, sums),
            rows=math.prod(group.stored.shape) // shape.columns,
            columns=shape.columns,
            directions=shape.directions or None,
            expected_error=ratio(sums["expected"], sums["square"]) ** 0.5,
            worst_row=sums["worst_row"],
            evenness=ratio(sums["expected"] ** 2, sums["expected_square"]),
            largest_share=ratio(sums["most_expected"], sums["expected"]),
            estimated=estimated,
        )

    def _read_mean_row(self, name: str) -> np.ndarray:
        sketches = self._reference.array(f"weights.{name}")
        return np.asarray(sketches.mean(0, dtype=np.float64))


def _known_site(name: str, scheme: Scheme) -> str | None:
    """Returns the site with the inputs of a quantized linear, None for other tensors."""
    if not scheme.is_quantized:
        return None
    return input_site(name)
