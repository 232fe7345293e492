"""The charts of a result by layer."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rgexport.validate.bisect.site_errors import layer_of
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.report.chart import (
    Chart,
    Limit,
    Series,
    decade_ticks,
    fifth_ticks,
    linear_scale,
    logarithmic_scale,
)
from rgexport.validate.report.picture_parts import (
    all_ys,
    by_x,
    picture,
    sides,
    span,
    whole,
    worst,
)
from rgexport.validate.report.report_words import LABELS, number
from rgexport.validate.result import Result
from rgexport.validate.weights.weight_errors import WeightError


def state_chart(r: Result) -> Chart:
    """The worst state of each layer after the last token."""
    series = []
    for kind, side in sides(r):
        found = _by_layer((layer_of(s.name), s.relative_max) for s in side.states)
        points = [(x, worst(ys)) for x, ys in found.items()]
        series.append(Series(kind, LABELS[kind], points, dots=True))
    limit = r.tolerance.at(r.text.tokens).states
    told = (f"from the {one.label}'s {span(one.points, number)}" for one in series)
    return picture(
        "Error of the states by layer",
        f"Largest error of each layer's states after the last token, relative to the largest "
        f"value: {', '.join(told)}; the latter's limit is {number(limit)}.",
        ("layer", "max |Δ| ÷ max"),
        series,
        logarithmic_scale(all_ys(series), limit),
        decade_ticks,
        limit=Limit(f"limit for the {LABELS['twin']}", lambda x: limit),
        rows=("layer", by_x(series, whole, number)),
    )


def weight_chart(weights: Sequence[WeightError]) -> Iterator[Chart]:
    """The relative error of each layer's weights, if any were rounded."""
    rounded = (error for error in weights if error.max_steps != 0)
    found = _by_layer((layer_of(error.name), error.relative_error) for error in rounded)
    if not found:
        return
    points = found.items()
    series = [
        Series("plain", "worst tensor", [(x, worst(ys)) for x, ys in points], True),
        Series("pale", "root mean square", [(x, _rms(ys)) for x, ys in points], True),
    ]
    told = (f"{one.label}: {span(one.points, number)}" for one in series)
    yield picture(
        "Error of the weights by layer",
        f"Relative error of the rounded tensors, {'; '.join(told)}.",
        ("layer", "‖W−Ŵ‖ ÷ ‖W‖"),
        series,
        linear_scale(all_ys(series)),
        fifth_ticks,
        rows=("layer", by_x(series, whole, number)),
    )


def site_chart(report: SiteReport) -> Iterator[Chart]:
    """The worst op and the worst state of each layer, each in units of its limit."""
    ops = _by_layer((e.layer, e.excess) for e in report.errors if e.state is None)
    states = _by_layer((e.layer, e.excess) for e in report.errors if e.state is not None)
    series = [
        Series(kind, label, [(x, worst(ys)) for x, ys in found.items()], dots=True)
        for kind, label, found in (("plain", "worst op", ops), ("pale", "worst state", states))
        if found
    ]
    if not series:
        return
    told = [f"{one.label}: {span(one.points, number)}" for one in series]
    if outside := [error.excess for error in report.errors if error.layer is None]:
        told.append(f"outside the layers: up to {number(worst(outside))}")
    yield picture(
        "Error of each layer's own ops",
        f"Error in units of its limit, {'; '.join(told)}. Up to 1 it is rounding.",
        ("layer", "error ÷ limit"),
        series,
        logarithmic_scale(all_ys(series), 1.0),
        decade_ticks,
        limit=Limit("limit", lambda x: 1.0),
        rows=("layer", by_x(series, whole, number)),
    )


def _by_layer(values: Iterable[tuple[int | None, float]]) -> dict[int, list[float]]:
    """Without what is in no layer."""
    found: dict[int, list[float]] = defaultdict(list)
    for layer, value in values:
        if layer is not None:
            found[layer].append(value)
    return found


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))
