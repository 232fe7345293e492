"""Compares the errors of stored weights with their limits.

Most quantities, see `WeightError`, do not depend on the weights, only on their rounding: a sound
artifact is at 1 (noise) or 0 (shift), and other weights are far beyond. So these checks find
another model even where its logits are as near as those of the right one in four bits. Limits that
depend on the algorithm are in `expectations`. The projection is limited without clipping, and
beyond five deviations of its rounding noise; the least squared error makes weights smaller.

An algorithm that weighs errors by data may move any weight by more than half a step, so limits of
errors leave room for other weights. An encoder that runs again leaves none: see `reproduce`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.tensor import WeightSource
from rgexport.progress import Advance
from rgexport.quantize.algorithms.statistics import StatisticsOf
from rgexport.quantize.plan import quantized
from rgexport.validate.checks import Check
from rgexport.validate.weights.expectations import EXPECTATIONS, HALF_STEPS
from rgexport.validate.weights.sketch_errors import SketchError
from rgexport.validate.weights.tensor_errors import TensorError
from rgexport.validate.weights.tensor_pairs import of_each_tensor, paired_slabs
from rgexport.validate.weights.weight_errors import WeightError

SHIFT = 0.4
"""Limit of the shift: rounding has no direction, except in weights of a few values.

Measured: up to 0.01. Zero points that are off by one have 1, and matrices of -a, 0 and a 0.33.
"""
CHANCE = 1e-6
"""The probability that a sound tensor fails a check of its sketch."""
DEVIATIONS = 5
"""Standard deviations of rounding noise that the shift and the projection may be off."""
REASONS = {
    "noise": "the error has the size of rounding errors",
    "row": "every row is its own original, rounded",
    "shift": "rounded up as often as down",
    "projection": "scales are neither too large nor too small",
    "output": "outputs for a text are no worse than those of weights rounded to nearest",
}
"""Quantity → the meaning of a value within the limit; for `max_steps`, see `Expectation.why`."""

Limited = tuple[str, float, float]
"""Quantity, its value and limit."""


def weight_checks(errors: Sequence[WeightError]) -> Iterator[Check]:
    """Checks the weight table: of each kind, the tensor nearest to its limit, and all beyond it."""
    checks: list[Check] = []
    for error in errors:
        limits = _weight_limits(error)
        checks.extend(_tensor_check("weights", error, limited) for limited in limits)
    return _worst_of_each_kind(checks)


def sketch_checks(errors: Sequence[SketchError]) -> Iterator[Check]:
    """Checks errors against a file's sketches, as `weight_checks` does for the weight table."""
    checks: list[Check] = []
    for error in errors:
        limits = _sketch_limits(error)
        checks.extend(_tensor_check("reference", error, limited) for limited in limits)
    return _worst_of_each_kind(checks)


def _tensor_check(table: str, error: TensorError, limited: Limited) -> Check:
    quantity, value, limit = limited
    meaning = REASONS.get(quantity, EXPECTATIONS[error.chosen].why)
    return Check(
        name=f"{table}.{error.name}.{quantity}",
        value=value,
        limit=limit,
        reason=f"{error.scheme}: {meaning}",
        kind=f"{table}.{quantity}",
    )


def _worst_of_each_kind(checks: Sequence[Check]) -> Iterator[Check]:
    """Yields the check of each kind that is nearest to its limit, and all that did not pass."""
    checks_of_kind: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        checks_of_kind[check.kind].append(check)
    for of_kind in checks_of_kind.values():
        of_kind.sort(key=lambda check: check.excess, reverse=True)
        yield of_kind[0]
        yield from (check for check in of_kind[1:] if not check.passed)


def _weight_limits(error: WeightError) -> Iterator[Limited]:
    expected = EXPECTATIONS[error.chosen]
    yield "max_steps", error.max_steps, expected.max_steps

    noise_limit = expected.noise
    if expected.bounded:
        noise_limit = HALF_STEPS
    yield "noise", error.noise, noise_limit

    if error.quantized:
        yield _shift_limit(error, error.values)

    clipping = error.clipping
    if expected.searched:
        clipping = 0.0  # a search chooses how much to clip: `shrinks` has it
    square = error.relative_error**2
    deviation = error.relative_error / error.values**0.5
    yield _projection_limit(error, square, expected.shrinks, deviation, clipping)

    # A search that clips outliers is no fault of the artifact: its encoder does the same.
    output_limit = expected.output_noise * max(1.0, error.encoder_noise or 0.0)
    yield from _output_limit(error, output_limit)


def _sketch_limits(error: SketchError) -> Iterator[Limited]:
    expected = EXPECTATIONS[error.chosen]
    values = error.rows * error.columns
    products = error.evenness * (error.directions or 0)  # independent products of the tensor

    yield "noise", error.noise, _sketch_noise_limit(error, products)

    row_products = error.directions or error.columns
    row_uncertainty = _chance_maximum(row_products, 1 / row_products, CHANCE / error.rows)
    yield "row", error.worst_row, expected.row_noise * row_uncertainty

    if error.quantized:
        yield _shift_limit(error, values)

    # Without the weights it is not known how many clip: by rounding to nearest, too, some shrink.
    square = min(error.relative_error**2, expected.noise * error.expected_error**2)
    shrinks = (min(expected.shrinks[0], 0.0), max(expected.shrinks[1], 1.0))
    deviation = _sketch_deviation(error, square, products)
    yield _projection_limit(error, square, shrinks, deviation)

    yield from _output_limit(error, expected.sketch_output_noise or expected.output_noise)


def _sketch_noise_limit(error: SketchError, products: float) -> float:
    limit = HALF_STEPS
    if error.quantized:
        limit = EXPECTATIONS[error.chosen].noise
    if error.directions:
        limit *= _chance_maximum(products, error.largest_share / error.directions)
    return limit


def _sketch_deviation(error: SketchError, square: float, products: float) -> float:
    """Returns the standard deviation of the projection, of rounding and of the estimate."""
    if not error.directions:
        return error.relative_error / (error.rows * error.columns) ** 0.5
    if error.estimated:
        # The projection is estimated from as many independent products of W and E.
        return error.relative_error / products**0.5
    # √(2/products) is the relative error of ‖W−Ŵ‖², from which the norms give the projection.
    rounding = error.relative_error / (error.rows * error.columns) ** 0.5
    return rounding + square * (2 / products) ** 0.5 / 2


def _shift_limit(error: TensorError, values: int) -> Limited:
    limit = SHIFT + DEVIATIONS / math.sqrt(12 * values)
    return "shift", abs(error.shift), limit


def _projection_limit(
    error: TensorError,
    square: float,
    shrinks: tuple[float, float],
    deviation: float,
    clipping: float = 0.0,
) -> Limited:
    """Limits the distance of the projection from the middle of its range.

    With ρ² = ‖W−Ŵ‖²/‖W‖², the `square`, the least squared error changes the projection by -ρ²,
    unbiased rounding by 0; `shrinks` is in units of ρ².
    """
    least, most = shrinks
    change = error.projection - 1 - clipping + square * (least + most) / 2
    tolerance = EXPECTATIONS[error.chosen].projection + square * (most - least) / 2
    return "projection", abs(change), tolerance + DEVIATIONS * deviation


def _output_limit(error: TensorError, limit: float) -> Iterator[Limited]:
    if error.output_noise is None or not error.quantized:
        return
    if error.name == EMBEDDING:
        limit = max(limit, EXPECTATIONS[error.chosen].embedding_output_noise)
    # Mixtures of inputs that are alike count as two.
    uncertainty = _chance_maximum(2 * error.rows, 0.5 / error.rows)
    yield "output", error.output_noise, limit * uncertainty


def _chance_maximum(products: float, share: float, chance: float = CHANCE) -> float:
    """Returns the value that a mean of squares of random products, expected 1, exceeds by chance.

    Laurent and Massart (2000, lemma 1), for as many `products` of at most the `share` each.
    """
    x = -math.log(chance)
    return 1 + 2 * math.sqrt(x / products) + 2 * x * share


_SAME = 2.0**-9
"""Largest relative difference of weights that are stored as the same level.

Levels of 8 bits differ by 2⁻⁸ at least; Core ML rounds their products with scales to float16.
"""
_SLAB_BYTES = 4 << 20
"""Float32 bytes of a slab: statistics are read once for many rows."""


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """The number of a tensor's `values` that are stored as other values than the encoder gives."""

    name: str
    scheme: str
    values: int
    different: int


def reproduce(
    artifact: Artifact, original: WeightSource, statistics: StatisticsOf
) -> list[Reproduced]:
    """Compares all quantized tensors of an artifact with the encoded original's."""
    manifest = artifact.manifest
    tensors = {name: t for name, t in manifest.tensors.items() if t.scheme.is_quantized}
    weights = {name: original[name] for name in tensors}
    encoded = quantized(weights, manifest.plan, statistics)

    def compare(name: str, advance: Advance) -> Reproduced:
        stored = tensors[name]
        different = 0
        slabs = paired_slabs(encoded[name], artifact.weights[name], stored, _SLAB_BYTES)
        for _, expected, rows in slabs:
            same = np.abs(rows - expected) <= _SAME * np.abs(expected)  # false for NaN
            different += int((~same).sum())
            advance(expected.nbytes)
        values = math.prod(stored.shape)
        return Reproduced(name=name, scheme=stored.scheme.label, values=values, different=different)

    return of_each_tensor("Encoding the weights again", tensors, compare)


def reproduced_checks(tensors: list[Reproduced]) -> Iterator[Check]:
    """Checks the tensor that differs most, and every tensor that differs."""
    ranked = sorted(tensors, key=lambda tensor: -tensor.different)
    for index, tensor in enumerate(ranked):
        if index == 0 or tensor.different:
            yield Check(
                name=f"reproduced.{tensor.name}",
                value=float(tensor.different),
                limit=0,
                reason=f"{tensor.scheme}: weights that the encoder stores as other values",
                kind="reproduced",
            )
