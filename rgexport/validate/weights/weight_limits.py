"""How far stored weights may be from those that they were made from.

Most limits are of numbers that do not depend on what the weights are, only on how they were
rounded: a sound artifact is at 1 (noise) or 0 (shift), and other weights are far beyond. So these
checks find another model even where its logits are as near as those of the right one in four bits.
Limits that depend on the algorithm are in `expectations`. The measures:

- `max_steps`: max |W−Ŵ| in steps of the scheme; of a block, row or group its root mean square, in
  units of twice what rounding to nearest gives there.
- `noise`: ‖W−Ŵ‖² in units of Σ step²/12, the noise of rounding that is uniform within a step.
- `projection`: |⟨W,Ŵ⟩/⟨W,W⟩ − 1|, without clipping, beyond five deviations of its rounding noise.
  The least squared error counts clipping as an error, and makes weights smaller by its square.
- `output`: ‖(Ŵ−W)X‖² in units of what rounding to nearest makes, for the inputs X of a text.
  Whatever an algorithm weighs errors by, it must not be much worse than rounding to nearest.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rgexport.validate.checks import Check
from rgexport.validate.weights.expectations import EXPECTATIONS, HALF_STEPS, Expectation
from rgexport.validate.weights.sketch_errors import SketchError
from rgexport.validate.weights.weight_errors import WeightError

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
    expected = EXPECTATIONS[error.chosen]
    yield _check(error, "weights.max_steps", error.max_steps, expected.max_steps, expected.why)
    noise = HALF_STEPS if expected.bounded else expected.noise
    yield _noise_check(error, "weights", noise)
    yield from _shift_checks(error, "weights")
    change = error.projection - 1 - (0.0 if expected.searched else error.clipping)
    deviation, around = _shrinkage(change, error.relative_error**2, expected)
    noise = 5 * error.relative_error / error.values**0.5
    yield _projection_check(error, "weights", deviation, expected.projection + noise + around)
    yield from _output_checks(error, "weights")


def _of_sketch(error: SketchError) -> Iterator[Check]:
    expected = EXPECTATIONS[error.chosen]
    limit = expected.noise if error.quantized else HALF_STEPS
    if error.directions:
        limit *= _most(error.evenness * error.directions, error.largest_share / error.directions)
    yield _noise_check(error, "reference", limit)
    count = error.directions or error.columns
    limit = expected.row_noise * _most(count, 1 / count, CHANCE / error.rows)
    yield _check(
        error, "reference.row", error.worst_row, limit, "every row is its own original, rounded"
    )
    yield from _shift_checks(error, "reference")
    # Without the weights it is not known how many clip: by rounding to nearest, too, some shrink.
    square = min(error.relative_error**2, expected.noise * error.expected_error**2)
    known = error.relative_error / error.products**0.5
    if not error.estimated:
        known += square * error.uncertainty / 2
    least, most = min(expected.shrinks[0], 0.0), max(expected.shrinks[1], 1.0)
    unsure = replace(expected, shrinks=(least, most))
    deviation, around = _shrinkage(error.projection - 1, square, unsure)
    limit = expected.projection + around + 5 * known
    yield _projection_check(error, "reference", deviation, limit)
    yield from _output_checks(error, "reference")


def _shrinkage(change: float, square: float, expected: Expectation) -> tuple[float, float]:
    """How far `change`, the projection less 1, is from the middle of what is expected.

    And how far it may be. With ρ² = ‖W−Ŵ‖²/‖W‖², the least squared error gives -ρ², unbiased
    rounding 0.
    """
    least, most = expected.shrinks
    return change + square * (least + most) / 2, square * (most - least) / 2


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


def _output_checks(error: WeightError | SketchError, place: str) -> Iterator[Check]:
    if error.output_noise is not None and error.quantized:
        # Mixtures of inputs that are alike count as two.
        limit = EXPECTATIONS[error.chosen].output_noise * _most(2 * error.rows, 0.5 / error.rows)
        why = "outputs for a text are no worse than those of weights rounded to nearest"
        yield _check(error, f"{place}.output", error.output_noise, limit, why)


def _projection_check(
    error: WeightError | SketchError, place: str, deviation: float, limit: float
) -> Check:
    why = "scales are neither too large nor too small"
    return _check(error, f"{place}.projection", abs(deviation), limit, why)


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
