"""How far stored weights may be from those that they were made from, and the checks that apply it.

Most limits are of numbers that do not depend on what the weights are, only on how they were
rounded: a sound artifact is at 1 (noise) or 0 (shift), and other weights are far beyond. So these
checks tell another model where its logits are as near as those of the right one in four bits.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

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
"""|⟨W,Ŵ⟩/⟨W,W⟩ − 1|, clipping apart, beyond five deviations of its rounding noise.

The least squared error weighs clipping itself, and makes weights smaller by up to its square:
there, half of that is expected, and as much again allowed.
"""

NOISE = 1.5
"""‖W−Ŵ‖² in units of Σ step²/12, the noise of rounding that is uniform within a step.

Measured by `bench.sweep`: up to 1.1. Weights that miss their levels by one have 13, shuffled scales
3.2 and more, another tensor's values 100 and more.
"""
WEIGHTED_NOISE = 6.0
"""The same with an importance matrix, which leaves weights of no importance where they fall.

Measured with importances of two (four) orders of magnitude: up to 1.1 (3.7).
"""
HALF_STEPS = 12 * MAX_STEPS**2
"""The most that rounding to nearest can make of it: every weight is half a step off its level.

For what is known weight by weight, and for floats, whose steps are not alike.
"""
SHIFT = 0.4
"""|Σ(Ŵ−W)| / Σ step: rounding has no direction, but in weights of a few values.

Measured: up to 0.01. Zero points that are off by one have 1, and matrices of -a, 0 and a 0.33.
"""
CHANCE = 1e-6
"""That a sound tensor is beyond a limit of what its sketch tells."""

KINDS = frozenset(
    f"{place}.{what}"
    for place, measures in {
        "weights": ("max_steps", "noise", "shift", "projection"),
        "reference": ("noise", "row", "shift", "projection"),
    }.items()
    for what in measures
)
"""Of all checks that are made of a tensor."""

Error = TypeVar("Error", WeightError, SketchError)


def weight_checks(errors: Sequence[WeightError]) -> Iterator[Check]:
    """Of the weight table: in each kind, the tensor nearest to its limit, and all beyond it."""
    yield from _worst(errors, (_steps_check, _noise_check, _shift_check, _projection_check))


def sketch_checks(errors: Sequence[SketchError]) -> Iterator[Check]:
    """The same of what a reference file's sketches tell."""
    makers = (_sketch_noise, _sketch_row, _sketch_shift, _sketch_projection)
    yield from _worst(errors, makers)


def _worst(
    errors: Sequence[Error], makers: Iterable[Callable[[Error], Check | None]]
) -> Iterator[Check]:
    for make in makers:
        made = (make(error) for error in errors)
        checks = sorted((check for check in made if check), key=_by_excess, reverse=True)
        yield from checks[:1]
        yield from (check for check in checks[1:] if not check.passed)


def _by_excess(check: Check) -> tuple[bool, float]:
    return not check.passed, check.value / check.limit


def _steps_check(error: WeightError) -> Check:
    limit, why = MAX_STEPS, "rounded to nearest"
    if error.grouped:
        why = "levels chosen for the least error, no more than that of even ones"
    elif error.searched:
        limit, why = SEARCHED_STEPS, "rounded to nearest, steps chosen for the least error"
    return _check(error, "weights.max_steps", error.max_steps, limit, why)


def _noise_check(error: WeightError) -> Check:
    limit = _noise(error) if error.searched else HALF_STEPS
    return _check(error, "weights.noise", error.noise, limit, "of the size that rounding makes")


def _shift_check(error: WeightError) -> Check | None:
    return _shift(error, "weights.shift")


def _shift(error: WeightError | SketchError, kind: str) -> Check | None:
    if not error.quantized:
        return None
    limit = SHIFT + 5 / math.sqrt(12 * error.values)
    return _check(error, kind, abs(error.shift), limit, "rounded up as much as down")


def _projection_check(error: WeightError) -> Check:
    deviation = error.projection - 1
    smaller = error.relative_error**2 / 2 if error.searched else 0.0
    return _check(
        error,
        "weights.projection",
        abs(deviation + smaller if error.searched else deviation - error.clipping),
        PROJECTION + 5 * error.relative_error / error.values**0.5 + smaller,
        "scales are neither too large nor too small",
    )


def _noise(error: WeightError | SketchError) -> float:
    return WEIGHTED_NOISE if error.weighted else NOISE


def _sketch_noise(error: SketchError) -> Check:
    limit = _noise(error) if error.quantized else HALF_STEPS
    if error.directions:
        limit *= _most(error.evenness * error.directions, error.largest_share / error.directions)
    return _check(error, "reference.noise", error.noise, limit, "of the size that rounding makes")


def _sketch_row(error: SketchError) -> Check:
    count = error.directions or error.columns
    limit = _noise(error) * _most(count, 1 / count, CHANCE / error.rows)
    return _check(error, "reference.row", error.worst_row, limit, "no row is another one")


def _most(products: float, share: float, chance: float = CHANCE) -> float:
    """What a mean of squares of random products is surely not beyond, in units of what it is of.

    Laurent and Massart (2000, lemma 1), for so many products of equal shares, or as uneven ones,
    of which none is larger than `share`.
    """
    x = -math.log(chance)
    return 1 + 2 * math.sqrt(x / products) + 2 * x * share


def _sketch_shift(error: SketchError) -> Check | None:
    return _shift(error, "reference.shift")


def _sketch_projection(error: SketchError) -> Check:
    """Of the two, -ρ² with ρ = ‖W−Ŵ‖/‖W‖ is what the least squared error gives, 0 its opposite."""
    square = min(error.relative_error, error.expected_error) ** 2
    known = error.relative_error / error.values**0.5 + square * error.uncertainty / 2
    return _check(
        error,
        "reference.projection",
        abs(error.projection - 1 + square / 2),
        PROJECTION + square / 2 + 5 * known,
        "scales are neither too large nor too small",
    )


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
