"""The charts of results: along the text, by layer, and cost by size."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath

import numpy as np

from rgexport.validate.bisect.site_errors import layer_of
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.measure import Comparison
from rgexport.validate.positions import PositionBlock
from rgexport.validate.report.chart import (
    Chart,
    Point,
    Series,
    Show,
    linear_axis,
    logarithmic_axis,
    share_axis,
)
from rgexport.validate.report.result_tables import cost_of, sides_of
from rgexport.validate.report.words import LABELS, number, percent
from rgexport.validate.result import Result
from rgexport.validate.states import Drift, StateError, worst
from rgexport.validate.weights.tensor_errors import WeightError

AGREEMENT_BLOCKS = 32
"""At most so many points: a share needs more positions than a mean of KL to be meaningful."""
_MOST_NAME = 26
_STATE_LINES = {
    "rg_lru": "plain",
    "key": "plain dashed",
    "conv1d": "pale",
    "value": "pale dashed",
}
"""Kind of state → CSS classes of its line."""
_STATE_MEASURE = "after so many tokens, relative to the largest value"


def charts(r: Result) -> Iterator[Chart]:
    """All of a result, without those of the ops and of the reference file."""
    sides = sides_of(r)
    yield _kl_chart(r)
    yield _agreement_chart(r)
    if any(side.drift and side.states for _, side in sides):
        yield drift_chart(r)
    if r.dequantized.drift:
        title = f"Drift from the {LABELS['twin']}, by kind of state"
        yield from kinds_chart(title, _with_end(r, r.dequantized), _state_limit(r, "limit"))
    if any(side.states for _, side in sides):
        yield _layer_state_chart(r)
    yield from _weight_chart(r.weights or [])


def _kl_chart(r: Result) -> Chart:
    series = _lines(r, lambda side: [(b.start, b.kl_mean) for b in side.blocks])
    return Chart(
        title="KL by position",
        summary=f"Mean KL per block of positions, {_ranges('against the {} {}', series)}.",
        labels=("position in the text", "KL, nats"),
        series=series,
        y=logarithmic_axis(_ys(series)),
        column="positions",
        show_x=_positions(series[0], r.text.tokens),
    )


def _agreement_chart(r: Result) -> Chart:
    series = _lines(r, lambda side: list(_agreement(side.blocks)))
    ranges = _ranges("with the {} {}", series, percent)
    return Chart(
        title="Top-1 agreement by position",
        summary=f"Share of positions with the same most likely token, {ranges}.",
        labels=("position in the text", "top-1 agreement"),
        series=series,
        y=share_axis(_ys(series)),
        column="positions",
        show_x=_positions(series[0], r.text.tokens),
        show_y=percent,
    )


def _agreement(blocks: Sequence[PositionBlock]) -> Iterator[Point]:
    """Neighbouring blocks are merged, so that there are at most `AGREEMENT_BLOCKS` points."""
    together = math.ceil(len(blocks) / AGREEMENT_BLOCKS)
    for first in range(0, len(blocks), together):
        group = blocks[first : first + together]
        same = sum(block.top1 * (block.stop - block.start) for block in group)
        yield group[0].start, same / (group[-1].stop - group[0].start)


def drift_chart(r: Result) -> Chart:
    """The worst state after 64, 128, … tokens and after the whole text."""
    series = _lines(r, lambda side: [(d.position, worst(d.states)) for d in _with_end(r, side)])
    limit = _state_limit(r, f"limit for the {LABELS['twin']}")
    ranges = _ranges("from the {}'s {}", series)
    return _drift_chart(
        "Drift of the states",
        f"Largest error of any state {_STATE_MEASURE}: {ranges}; the latter's limit is "
        f"{number(limit.points[-1][1])} at the end.",
        series,
        limit,
    )


def kinds_chart(title: str, drift: Sequence[Drift], limit: Series | None = None) -> Iterator[Chart]:
    """The worst state of each kind; no chart without states."""
    series = [
        Series(drawn, kind, [(d.position, worst(_of_kind(d, kind))) for d in drift])
        for kind, drawn in _STATE_LINES.items()
        if drift and _of_kind(drift[0], kind)
    ]
    if series:
        summary = f"Largest error {_STATE_MEASURE}: {_ranges('{} {}', series)}."
        yield _drift_chart(title, summary, series, limit)


def _drift_chart(title: str, summary: str, series: list[Series], limit: Series | None) -> Chart:
    return Chart(
        title=title,
        summary=summary,
        labels=("tokens, logarithmic", "max |Δ| ÷ max"),
        series=series,
        y=logarithmic_axis(_ys(series), None if limit is None else limit.points[-1][1]),
        limit=limit,
        doubling=True,
        column="tokens",
    )


def _state_limit(r: Result, label: str) -> Series:
    """The limit of the error against the dequantized reference; it grows with the tokens."""
    positions = [drift.position for drift in _with_end(r, sides_of(r)[0][1])]
    return Series("limit", label, [(x, r.tolerance.at(x).states) for x in positions])


def _with_end(r: Result, side: Comparison) -> list[Drift]:
    return [*side.drift, Drift(position=r.text.tokens, states=side.states)]


def _of_kind(drift: Drift, kind: str) -> list[StateError]:
    return [state for state in drift.states if state.name.endswith(f".{kind}")]


def _layer_state_chart(r: Result) -> Chart:
    def errors(side: Comparison) -> list[Point]:
        return _worst_by_layer((layer_of(s.name), s.relative_max) for s in side.states)

    series = _lines(r, errors, dots=True)
    ranges = _ranges("from the {}'s {}", series)
    limit = r.tolerance.at(r.text.tokens).states
    return _layer_chart(
        "Error of the states by layer",
        "Largest error of each layer's states after the last token, relative to the largest "
        f"value: {ranges}; the latter's limit is {number(limit)}.",
        "max |Δ| ÷ max",
        series,
        Series("limit", f"limit for the {LABELS['twin']}", [(0, limit)]),
    )


def _weight_chart(weights: Sequence[WeightError]) -> Iterator[Chart]:
    """Of each layer's weights, if any were rounded."""
    rounded = [error for error in weights if error.max_steps != 0]
    found = _by_layer((layer_of(error.name), error.relative_error) for error in rounded)
    if not found:
        return
    series = [
        Series("plain", "worst tensor", [(x, float(np.max(ys))) for x, ys in found.items()], True),
        Series("pale", "root mean square", [(x, rms(ys)) for x, ys in found.items()], True),
    ]
    yield Chart(
        title="Error of the weights by layer",
        summary=f"Relative error of the rounded tensors, {_ranges('{}: {}', series, joint='; ')}.",
        labels=("layer", "‖W−Ŵ‖ ÷ ‖W‖"),
        series=series,
        y=linear_axis(_ys(series)),
    )


def site_charts(report: SiteReport) -> Iterator[Chart]:
    """The worst op and the worst state of each layer, each in units of its limit."""
    ops = _worst_by_layer((e.layer, e.excess) for e in report.errors if e.state is None)
    states = _worst_by_layer((e.layer, e.excess) for e in report.errors if e.state is not None)
    found = ("plain", "worst op", ops), ("pale", "worst state", states)
    series = [Series(kind, label, points, dots=True) for kind, label, points in found if points]
    if not series:
        return
    ranges = _ranges("{}: {}", series, joint="; ")
    if outside := [error.excess for error in report.errors if error.layer is None]:
        ranges += f"; outside the layers: up to {number(float(np.max(outside)))}"
    yield _layer_chart(
        "Error of each layer's own ops",
        f"Error ÷ limit, {ranges}. Values up to 1 pass.",
        "error ÷ limit",
        series,
        Series("limit", "limit", [(0, 1.0)]),
    )


def _layer_chart(
    title: str, summary: str, label: str, series: list[Series], limit: Series
) -> Chart:
    return Chart(
        title=title,
        summary=summary,
        labels=("layer", label),
        series=series,
        y=logarithmic_axis(_ys(series), limit.points[0][1]),
        limit=limit,
    )


def cost_charts(results: Sequence[Result]) -> Iterator[Chart]:
    """KL to the original by size, if at least two artifacts were compared with one."""
    found = sorted(
        (r.artifact.bytes / 1e6, cost.kl.mean, PurePath(r.artifact.path).name)
        for r in results
        if (cost := cost_of(r)) is not None and math.isfinite(cost.kl.mean)
    )
    if len(found) < 2:
        return
    names = [name if len(name) <= _MOST_NAME else f"{name[:_MOST_NAME]}…" for *_, name in found]
    points = [(size, kl) for size, kl, _ in found]
    costs = "; ".join(f"{name}: {size:,.0f} MB, {number(kl)}" for size, kl, name in found)
    yield Chart(
        title="What compression costs, by size",
        summary=f"Mean KL in nats per token against the size of the files. {costs}.",
        labels=("size, MB", "KL, nats per token"),
        series=[Series("original", "KL to the original", points, dots=True, names=names)],
        y=logarithmic_axis([kl for _, kl in points]),
        column="size, MB",
        show_x=lambda size: f"{size:,.1f}",
    )


def _lines(
    r: Result, points: Callable[[Comparison], Sequence[Point]], dots: bool = False
) -> list[Series]:
    """A series of each comparison; that with the original is drawn first, below the other."""
    sides = reversed(sides_of(r))
    return [Series(kind, LABELS[kind], points(side), dots) for kind, side in sides]


def _ys(series: Sequence[Series]) -> list[float]:
    return [y for one in series for _, y in one.points]


def _ranges(words: str, series: Sequence[Series], show: Show = number, joint: str = ", ") -> str:
    """The label and the range of each series, in `words`."""
    return joint.join(words.format(one.label, _range(one.points, show)) for one in series)


def _range(points: Sequence[Point], show: Show = number) -> str:
    ys = [y for _, y in points if math.isfinite(y)]
    missing = len(points) - len(ys)
    said = f"{show(min(ys))} to {show(max(ys))}" if ys else "no finite value"
    return f"{said}, {missing} of {len(points)} not finite" if missing and ys else said


def _positions(series: Series, end: int) -> Show:
    """Names a block of positions, which ends where the next one or the text does."""
    starts = [int(x) for x, _ in series.points]
    stops = dict(zip(starts, [*starts[1:], end], strict=True))
    return lambda x: f"{x:,}" if stops[int(x)] - x == 1 else f"{x:,}–{stops[int(x)] - 1:,}"


def _by_layer(values: Iterable[tuple[int | None, float]]) -> dict[int, list[float]]:
    """Without values that belong to no layer."""
    found: dict[int, list[float]] = defaultdict(list)
    for layer, value in values:
        if layer is not None:
            found[layer].append(value)
    return found


def _worst_by_layer(values: Iterable[tuple[int | None, float]]) -> list[Point]:
    """The largest of each layer; NaN where one is."""
    return [(layer, float(np.max(found))) for layer, found in _by_layer(values).items()]


def rms(values: Sequence[float]) -> float:
    """Root mean square."""
    return math.sqrt(sum(value * value for value in values) / len(values))
