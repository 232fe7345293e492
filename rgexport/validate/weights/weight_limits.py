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
from rgexport.quantize.plan import quantized
from rgexport.quantize.statistics import StatisticsOf
from rgexport.validate.checks import Check
from rgexport.validate.weights import tensor_errors
from rgexport.validate.weights.expectations import EXPECTATIONS, HALF_STEPS

SHIFT = 0.4
"""Limit of the shift: rounding has no direction, except in weights of a few values.

Measured: up to 0.01. Zero points that are off by one have 1, and matrices of -a, 0 and a 0.33.
"""
CHANCE = 1e-6
"""The probability that a sound tensor fails a check of its sketch."""
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


def weight_checks(errors: Sequence[tensor_errors.WeightError]) -> Iterator[Check]:
    """Checks the weight table: of each kind, the tensor nearest to its limit, and all beyond it."""
    return _worst_checks("weights", [(error, list(_weight_limits(error))) for error in errors])


def sketch_checks(errors: Sequence[tensor_errors.SketchError]) -> Iterator[Check]:
    return _worst_checks("reference", [(error, list(_sketch_limits(error))) for error in errors])


def _worst_checks(
    table: str, tensors: Sequence[tuple[tensor_errors.TensorError, list[Limited]]]
) -> Iterator[Check]:
    kinds: dict[str, list[Check]] = defaultdict(list)
    for error, limits in tensors:
        for quantity, value, limit in limits:
            why = REASONS.get(quantity, EXPECTATIONS[error.chosen].why)
            name, kind = f"{table}.{error.name}.{quantity}", f"{table}.{quantity}"
            reason = f"{error.scheme}: {why}"
            kinds[kind].append(Check(name=name, value=value, limit=limit, reason=reason, kind=kind))
    for checks in kinds.values():
        checks.sort(key=lambda check: check.excess, reverse=True)
        yield checks[0]
        yield from (check for check in checks[1:] if not check.passed)


def _weight_limits(error: tensor_errors.WeightError) -> Iterator[Limited]:
    expected = EXPECTATIONS[error.chosen]
    yield "max_steps", error.max_steps, expected.max_steps
    yield "noise", error.noise, HALF_STEPS if expected.bounded else expected.noise
    clipping = 0.0 if expected.searched else error.clipping
    square, deviation = error.relative_error**2, error.relative_error / error.values**0.5
    yield from _shared_limits(error, error.values, square, expected.shrinks, deviation, clipping)
    yield from _output_limit(error, expected.output_noise * max(1.0, error.encoder_noise or 0.0))


def _sketch_limits(error: tensor_errors.SketchError) -> Iterator[Limited]:
    expected = EXPECTATIONS[error.chosen]
    values, known = error.rows * error.columns, error.evenness * (error.directions or 0)
    limit = expected.noise if error.quantized else HALF_STEPS
    if error.directions:
        limit *= _most(known, error.largest_share / error.directions)
    yield "noise", error.noise, limit
    count = error.directions or error.columns
    limit = expected.row_noise * _most(count, 1 / count, CHANCE / error.rows)
    yield "row", error.worst_row, limit
    # Without the weights it is not known how many clip: by rounding to nearest, too, some shrink.
    square = min(error.relative_error**2, expected.noise * error.expected_error**2)
    # Estimated from as many independent products of W and E.
    independent = known if error.estimated and error.directions else values
    deviation = error.relative_error / independent**0.5
    if error.directions and not error.estimated:  # √(2/known): the relative error of ‖W−Ŵ‖²
        deviation += square * (2 / known) ** 0.5 / 2
    shrinks = min(expected.shrinks[0], 0.0), max(expected.shrinks[1], 1.0)
    yield from _shared_limits(error, values, square, shrinks, deviation)
    yield from _output_limit(error, expected.sketch_output_noise or expected.output_noise)


def _shared_limits(
    error: tensor_errors.TensorError,
    values: int,
    square: float,
    shrinks: tuple[float, float],
    deviation: float,
    clipping: float = 0.0,
) -> Iterator[Limited]:
    """Limits the shift, and the distance of the projection from the middle of its range.

    With ρ² = ‖W−Ŵ‖²/‖W‖², the `square`, the least squared error changes the projection by -ρ²,
    unbiased rounding by 0; `shrinks` is in units of ρ².
    """
    expected, (least, most) = EXPECTATIONS[error.chosen], shrinks
    if error.quantized:
        yield "shift", abs(error.shift), SHIFT + 5 / math.sqrt(12 * values)
    change = error.projection - 1 - clipping + square * (least + most) / 2
    tolerance = expected.projection + square * (most - least) / 2
    yield "projection", abs(change), tolerance + 5 * deviation


def _output_limit(error: tensor_errors.TensorError, most: float) -> Iterator[Limited]:
    if error.output_noise is not None and error.quantized:
        if error.name == EMBEDDING:
            most = max(most, EXPECTATIONS[error.chosen].embedding_output_noise)
        # Mixtures of inputs that are alike count as two.
        yield "output", error.output_noise, most * _most(2 * error.rows, 0.5 / error.rows)


def _most(products: float, share: float, chance: float = CHANCE) -> float:
    """Returns the value that a mean of squares of random products, expected 1, exceeds by chance.

    Laurent and Massart (2000, lemma 1), for as many `products` of at most the `share` each.
    """
    x = -math.log(chance)
    return 1 + 2 * math.sqrt(x / products) + 2 * x * share


_SAME = 2.0**-9
"""Levels of 8 bits differ by 2⁻⁸ at least; Core ML rounds their products with scales to float16."""
_SLAB_BYTES = 4 << 20  # float32 bytes of a slab: statistics are read once for many rows


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """How many of a tensor's `values` are stored as other values than the encoder gives."""

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
    encoded = quantized({name: original[name] for name in tensors}, manifest.plan, statistics)

    def compare(name: str, advance: Advance) -> Reproduced:
        stored, different = tensors[name], 0
        pairs = tensor_errors.paired_slabs(
            encoded[name], artifact.weights[name], stored, _SLAB_BYTES
        )
        for _, expected, rows in pairs:
            same = np.abs(rows - expected) <= _SAME * np.abs(expected)  # false for NaN
            different += int((~same).sum())
            advance(expected.nbytes)
        values = math.prod(stored.shape)
        return Reproduced(name=name, scheme=stored.scheme.label, values=values, different=different)

    return tensor_errors.of_each_tensor("Encoding the weights again", tensors, compare)


def reproduced_checks(tensors: list[Reproduced]) -> Iterator[Check]:
    """Checks the tensor that differs most, and every tensor that differs."""
    worst = sorted(tensors, key=lambda tensor: -tensor.different)
    for one in worst[:1] + [tensor for tensor in worst[1:] if tensor.different]:
        name, value = f"reproduced.{one.name}", float(one.different)
        reason = f"{one.scheme}: weights that the encoder stores as other values"
        yield Check(name=name, value=value, limit=0, reason=reason, kind="reproduced")
