"""Errors of stored weights against the original model's."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.storage import StoredGroup
from rgexport.griffin.layout import input_site
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.quantize.algorithms.statistics import no_statistics
from rgexport.quantize.plan import quantized
from rgexport.quantize.schemes.registry import Uniform
from rgexport.validate.weights import sketch
from rgexport.validate.weights.expectations import OUTPUT_NOISE, expectation
from rgexport.validate.weights.steps import step_sizes
from rgexport.validate.weights.tensor_errors import (
    Sums,
    TensorComparison,
    TensorError,
    output_sums,
    ratio,
    shared_fields,
)

_PIECE = 1 << 14
"""Weights that are converted to float64 at a time; the copies stay in cache."""


@dataclass(frozen=True, kw_only=True)
class WeightError(TensorError):
    """The original tensor W against the stored Ŵ, both as float32.

    - `relative_error`: ‖W−Ŵ‖/‖W‖.
    - `projection`: ⟨W,Ŵ⟩/⟨W,W⟩: 1 for unbiased rounding, 1.02 where every scale is 2 % too large.
    - `clipping`: the part of `projection - 1` that comes from rounding to nearest on the levels of
      the scheme, and from values beyond the outermost level of their block.
    - `max_steps`: max |W−Ŵ| in steps, without what clipping adds; where it is `grouped`, the
      largest root mean square of a block, a row or a group of rows.
    - `noise`: ‖W−Ŵ‖² in units of Σ step²/12, which rounding to nearest makes: about 1.
    - `shift`: Σ(Ŵ−W) in units of Σ step: about 0.
    - `output_noise`: ‖(Ŵ−W)X‖² in units of what rounding to nearest makes with the inputs X of a
      text; null where they are not known, or the weights are no linear's.
    - `encoder_noise`: the output noise of the original's weights, encoded again; null where it is
      not needed.
    - `searched`: whether levels were chosen for the least squared error; `chosen`: how.
    """

    values: int
    clipping: float
    max_steps: float
    searched: bool = False
    grouped: bool = False
    encoder_noise: float | None = None


def weight_errors(
    original: WeightSource,
    dequantized: WeightSource,
    tensors: Mapping[str, StoredTensor],
    weighted: bool = False,
    inputs: sketch.Mixtures | None = None,
) -> list[WeightError]:
    """Compares all `tensors`, each row group for itself, also over mixed `inputs` of linears."""
    comparison = _WeightComparison(original, weighted, inputs or {})
    errors = comparison.compare("Comparing weights", dequantized, tensors)

    clipped = _clipped_tensors(errors)
    if not clipped:
        return errors
    chosen = {name: tensors[name] for name in clipped}
    plan = {name: stored.scheme for name, stored in chosen.items()}
    encoded = quantized({name: original[name] for name in plan}, plan, no_statistics)
    encoder_errors = comparison.compare("Encoding the weights again", encoded, chosen)

    noise_of = {(error.name, error.scheme): error.output_noise for error in encoder_errors}
    return [replace(e, encoder_noise=noise_of.get((e.name, e.scheme))) for e in errors]


class _WeightComparison(TensorComparison[WeightError]):
    """A comparison with the original's weights."""

    def __init__(self, original: WeightSource, weighted: bool, inputs: sketch.Mixtures):
        self._original = original
        self._weighted = weighted
        self._inputs = inputs

    def original(self, name: str) -> RowTensor:
        return self._original[name]

    def measure(
        self, name: str, scheme: Uniform, original_rows: np.ndarray, rows: np.ndarray
    ) -> Sums:
        w = original_rows
        error = rows - w
        columns = w.shape[1]
        steps = step_sizes(name, w, scheme, expectation(scheme, self._weighted).measure)
        sums = _product_sums(w, error, steps.beyond_rounding(error, w))
        sums["max_steps"] = steps.largest(steps.without_clipping(error, w))
        sums["expected"] = float(steps.rounding(columns).sum())
        sums["moved"] = float(error.sum(dtype=np.float64))
        sums["steps"] = steps.total(columns)

        mixtures = self._inputs.get(input_site(name) or "")
        if mixtures is not None:
            sums |= output_sums(sketch.products(error, mixtures), steps, mixtures)
        return sums

    def summarize(self, name: str, group: StoredGroup, sums: Sums) -> WeightError:
        shape = group.stored.shape
        expected = expectation(group.stored.uniform, self._weighted)
        return WeightError(
            **shared_fields(name, group, self._weighted, sums),
            values=math.prod(shape),
            rows=shape[0],
            clipping=ratio(sums["along"] - sums["along_rounding"], sums["square"]),
            max_steps=sums["max_steps"],
            searched=expected.searched,
            grouped=expected.measure != "weight",
        )


def _clipped_tensors(errors: Iterable[WeightError]) -> set[str]:
    """Returns the names of tensors whose search may have made the noise of the outputs.

    Tensors with weighted levels are left out: their encoders need statistics.
    """
    clipped = set()
    weighted = set()
    for error in errors:
        if error.weighted:
            weighted.add(error.name)
        if _may_be_clipped(error):
            clipped.add(error.name)
    return clipped - weighted


def _may_be_clipped(error: WeightError) -> bool:
    """Whether the search, which knows no inputs, may have made so much noise of the outputs."""
    if not error.chosen.startswith("search") or error.output_noise is None:
        return False
    return not error.output_noise <= OUTPUT_NOISE  # true for NaN


def _product_sums(w: np.ndarray, error: np.ndarray, rest: np.ndarray) -> Sums:
    """Returns ⟨W,W⟩, ⟨W,E⟩, ⟨W,rest⟩ and ⟨E,E⟩ in float64.

    `rest` is the error that rounding to nearest does not explain.
    """
    flat_w = w.reshape(-1)
    flat_error = error.reshape(-1)
    flat_rest = rest.reshape(-1)
    sums = dict.fromkeys(("square", "along", "along_rounding", "error"), 0.0)
    for start in range(0, w.size, _PIECE):
        piece = slice(start, start + _PIECE)
        w_piece = flat_w[piece].astype(np.float64)
        error_piece = flat_error[piece].astype(np.float64)
        rest_piece = flat_rest[piece].astype(np.float64)
        sums["square"] += _dot(w_piece, w_piece)
        sums["along"] += _dot(w_piece, error_piece)
        sums["along_rounding"] += _dot(w_piece, rest_piece)
        sums["error"] += _dot(error_piece, error_piece)
    return sums


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # Not `a @ b`: BLAS would start threads of its own in each of ours.
    return float(np.einsum("i,i->", a, b))
