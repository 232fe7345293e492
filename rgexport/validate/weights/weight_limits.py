"""How far stored weights may be from those that they were made from.

Most limits are of numbers that do not depend on what the weights are, only on how they were
rounded: a sound artifact is at 1 (noise) or 0 (shift), and other weights are far beyond. So these
checks find another model even where its logits are as near as those of the right one in four bits.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rgexport.validate.checks import Check
from rgexport.validate.weights.sketch_errors import SketchError
from rgexport.validate.weights.weight_errors import WeightError

MAX_STEPS = 0.501
"""max |W−Ŵ| in steps of the scheme.

Rounding to nearest gives half a step, and 1e-5 more for the float32 arithmetic on 255 levels.
The step of a palette is twice the error of even levels, which k-means can only lessen.
"""
SEARCHED_STEPS = 3.0
"""The same where levels are chosen for the least squared error: a few outermost weights clip.

Measured on normal, uniform and heavy-tailed weights: up to 1.0, with an importance matrix 2.6.
"""

PROJECTION = 0.004
"""|⟨W,Ŵ⟩/⟨W,W⟩ − 1|, without clipping, beyond five deviations of its rounding noise.

The least squared error counts clipping as an error, and makes weights smaller by up to its square:
there, half of that is expected, and as much again allowed.
"""

NOISE = 1.5
"""‖W−Ŵ‖² in units of Σ step²/12, the noise of rounding that is uniform within a step.

Measured by `bench.sweep`: up to 1.1. Weights that miss their levels by one have 13, shuffled scales
3.2 and more, another tensor's values 100 and more.
"""
WEIGHTED_NOISE = 6.0
"""The same with an importance matrix, which lets unimportant weights be far from their levels.

Measured with importances of two (four) orders of magnitude: up to 1.1 (3.7).
"""
HALF_STEPS = 12 * MAX_STEPS**2
"""The same where every weight is half a step off its level, the most of rounding to nearest.

For tensors whose single weights are compared, and for floats, whose steps differ.
"""
SHIFT = 0.4
"""|Σ(Ŵ−W)| / Σ step: rounding has no direction, except in weights of a few values.

Measured: up to 0.01. Zero points that are off by one have 1, and matrices of -a, 0 and a 0.33.
"""
CHANCE = 1e-6
"""The probability that a sound tensor fails a check of its sketch."""


def weight_checks(errors: Sequence[WeightError]) -> Iterator[Check]:
    """From the weight table: of each kind, the tensor nearest to its limit, and all beyond it."""
    return _worst(check for error in errors for check in _of_weights(error))


def sketch_checks(errors: Sequence[SketchError]) -> Iterator[Check]:
    """The same from a reference file's sketches."""
    return _worst(check for error in errors for check in _of_sketch(error))


def _worst(checks: Iterable[Check]) -> Iterator[Check]:
    kinds: dict[str, list[Check]] = defaultdict(list)
    for check in checks:
        kinds[check.kind].append(check)
    for found in kinds.values():
        found.sort(key=lambda check: check.excess, reverse=True)
        yield found[0]
        yield from (check for check in found[1:] if not check.passed)


def _of_weights(error: WeightError) -> Iterator[Check]:
    limit, why = MAX_STEPS, "rounded to nearest"
    if error.grouped:
        why = "levels chosen for the least error, which even levels bound"
    elif error.searched:
        limit, why = SEARCHED_STEPS, "rounded to nearest, steps chosen for the least error"
    yield _check(error, "weights.max_steps", error.max_steps, limit, why)
    yield _noise_check(error, "weights", _noise(error) if error.searched else HALF_STEPS)
    yield from _shift_checks(error, "weights")
    deviation, smaller = error.projection - 1 - error.clipping, 0.0
    if error.searched:
        smaller = error.relative_error**2 / 2
        deviation = error.projection - 1 + smaller
    noise = 5 * error.relative_error / error.values**0.5
    yield _projection_check(error, "weights", deviation, noise + smaller)


def _of_sketch(error: SketchError) -> Iterator[Check]:
    limit = _noise(error) if error.quantized else HALF_STEPS
    if error.directions:
        limit *= _most(error.evenness * error.directions, error.largest_share / error.directions)
    yield _noise_check(error, "reference", limit)
    count = error.directions or error.columns
    limit = _noise(error) * _most(count, 1 / count, CHANCE / error.rows)
    yield _check(
        error, "reference.row", error.worst_row, limit, "every row is its own original, rounded"
    )
    yield from _shift_checks(error, "reference")
    # With ρ = ‖W−Ŵ‖/‖W‖, the least squared error gives a projection of 1-ρ², unbiased rounding 1.
    square = min(error.relative_error, error.expected_error) ** 2
    known = error.relative_error / error.products**0.5
    if not error.estimated:
        known += square * error.uncertainty / 2
    deviation = error.projection - 1 + square / 2
    yield _projection_check(error, "reference", deviation, square / 2 + 5 * known)


def _noise(error: WeightError | SketchError) -> float:
    return WEIGHTED_NOISE if error.weighted else NOISE


def _most(products: float, share: float, chance: float = CHANCE) -> float:
    """The value that a mean of squares of random products, expected 1, exceeds with `chance`.

    Laurent and Massart (2000, lemma 1), for as many `products` of equal shares or as uneven ones,
    of which none is larger than `share`.
    """
    x = -math.log(chance)
    return 1 + 2 * math.sqrt(x / products) + 2 * x * share


def _noise_check(error: WeightError | SketchError, place: str, limit: float) -> Check:
    return _check(
        error, f"{place}.noise", error.noise, limit, "the error has the size of rounding errors"
    )


def _shift_checks(error: WeightError | SketchError, place: str) -> Iterator[Check]:
    if error.quantized:
        limit = SHIFT + 5 / math.sqrt(12 * error.values)
        why = "rounded up as often as down"
        yield _check(error, f"{place}.shift", abs(error.shift), limit, why)


def _projection_check(
    error: WeightError | SketchError, place: str, deviation: float, more: float
) -> Check:
    why = "scales are neither too large nor too small"
    return _check(error, f"{place}.projection", abs(deviation), PROJECTION + more, why)


def _check(
    error: WeightError | SketchError, kind: str, value: float, limit: float, why: str
) -> Check:
    place, _, what = kind.partition(".")
    return Check(
        name=f"{place}.{error.name}.{what}",
        kind=kind,
        value=value,
        limit=limit,
        reason=f"{error.scheme}: {why}",
    )
