"""The charts of results: along the text, by layer, and cost by size."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePath

import numpy as np

from rgexport.reporting.chart import (
    Axis,
    Chart,
    FormatNumber,
    Point,
    Series,
    linear_axis,
    logarithmic_axis,
    share_axis,
    y_values,
)
from rgexport.reporting.numbers import number, percent
from rgexport.validate.bisect.site_errors import layer_of
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.measure import Comparison
from rgexport.validate.positions import PositionBlock
from rgexport.validate.report.sentences import LABELS
from rgexport.validate.report.tables import cost_of, sides_of
from rgexport.validate.result import Result
from rgexport.validate.states import Drift, StateError, worst
from rgexport.validate.weights.tensor_errors import WeightError

AGREEMENT_BLOCKS = 32
"""Most points of a curve: a share needs more positions than a mean of KL to be meaningful."""
_MOST_NAME = 26
_STATE_LINES = {
    "rg_lru": "plain",
    "key": "plain dashed",
    "conv1d": "pale",
    "value": "pale dashed",
}
"""Kind of state → CSS classes of its line."""
_STATE_MEASURE = "after so many tokens, relative to the largest value"
_FROM = "from the {}'s {}"
_STATE_LIMIT = f"limit for the {LABELS['twin']}"


def charts(r: Result) -> Iterator[Chart]:
    """Yields the charts of a result, except the charts of the ops and of the reference file."""
    sides = sides_of(r)
    yield _position_chart(
        r,
        "KL by position",
        "KL, nats",
        lambda side: [(block.start, block.kl_mean) for block in side.blocks],
        logarithmic_axis,
        lambda series: f"Mean KL per block of positions, {_ranges('against the {} {}', series)}.",
    )
    yield _position_chart(
        r,
        "Top-1 agreement by position",
        "top-1 agreement",
        lambda side: list(_agreement(side.blocks)),
        share_axis,
        lambda series: (
            "Share of positions with the same most likely token, "
            f"{_ranges('with the {} {}', series, percent)}."
        ),
        percent,
    )
    if any(side.drift and side.states for _, side in sides):
        yield _drift_by_side(r)
    if r.dequantized.drift:
        title = f"Drift from the {LABELS['twin']}, by kind of state"
        yield from kinds_chart(title, _with_end(r, r.dequantized), _state_limit(r, "limit"))
    if any(side.states for _, side in sides):
        yield _layer_state_chart(r)
    yield from _weight_chart(r.weights or [])


def _position_chart(
    r: Result,
    title: str,
    label: str,
    points: Callable[[Comparison], Sequence[Point]],
    axis: Callable[[Sequence[float]], Axis],
    summarize: Callable[[list[Series]], str],
    show: FormatNumber = number,
) -> Chart:
    series = _lines(r, points)
    return Chart(
        title=title,
        summary=summarize(series),
        labels=("position in the text", label),
        series=series,
        y=axis(y_values(series)),
        column="positions",
        show_x=_block_names(series[0], r.text.tokens),
        show_y=show,
    )


def _agreement(blocks: Sequence[PositionBlock]) -> Iterator[Point]:
    """Merges neighbouring blocks, so that there are at most `AGREEMENT_BLOCKS` points."""
    together = math.ceil(len(blocks) / AGREEMENT_BLOCKS)
    for first in range(0, len(blocks), together):
        group = blocks[first : first + together]
        same = sum(block.top1 * (block.stop - block.start) for block in group)
        yield group[0].start, same / (group[-1].stop - group[0].start)


def _drift_by_side(r: Result) -> Chart:
    """Charts the worst state after 64, 128, … tokens and after the whole text."""
    series = _lines(r, lambda side: [(d.position, worst(d.states)) for d in _with_end(r, side)])
    limit = _state_limit(r, _STATE_LIMIT)
    return _drift_chart(
        "Drift of the states",
        f"Largest error of any state {_STATE_MEASURE}: {_ranges(_FROM, series)}; the latter's "
        f"limit is {number(limit.points[-1][1])} at the end.",
        series,
        limit,
    )


def kinds_chart(title: str, drift: Sequence[Drift], limit: Series | None = None) -> Iterator[Chart]:
    """Charts the worst state of each kind; yields nothing if there are no states."""
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
        y=logarithmic_axis(y_values(series), None if limit is None else limit.points[-1][1]),
        limit=limit,
        doubling=True,
        column="tokens",
    )


def _state_limit(r: Result, label: str) -> Series:
    """Returns the limit against the dequantized reference; it grows with the tokens."""
    positions = [drift.position for drift in _with_end(r, r.dequantized)]
    return Series("limit", label, [(x, r.tolerance.at(x).states) for x in positions])


def _with_end(r: Result, side: Comparison) -> list[Drift]:
    return [*side.drift, Drift(position=r.text.tokens, states=side.states)]


def _of_kind(drift: Drift, kind: str) -> list[StateError]:
    return [state for state in drift.states if state.name.endswith(f".{kind}")]


def _layer_state_chart(r: Result) -> Chart:
    def errors(side: Comparison) -> list[Point]:
        return _worst_by_layer((layer_of(s.name), s.relative_max) for s in side.states)

    series = _lines(r, errors, dots=True)
    limit = r.tolerance.at(r.text.tokens).states
    return _layer_chart(
        "Error of the states by layer",
        "Largest error of each layer's states after the last token, relative to the largest "
        f"value: {_ranges(_FROM, series)}; the latter's limit is {number(limit)}.",
        "max |Δ| ÷ max",
        series,
        Series("limit", _STATE_LIMIT, [(0, limit)]),
    )


def _weight_chart(weights: Sequence[WeightError]) -> Iterator[Chart]:
    """Charts the errors of each layer's weights, if any were rounded."""
    rounded = [error for error in weights if error.max_steps != 0]
    layers = _by_layer((layer_of(error.name), error.relative_error) for error in rounded)
    if not layers:
        return
    series = [
        Series("plain", "worst tensor", [(x, float(np.max(ys))) for x, ys in layers.items()], True),
        Series("pale", "root mean square", [(x, rms(ys)) for x, ys in layers.items()], True),
    ]
    yield Chart(
        title="Error of the weights by layer",
        summary=f"Relative error of the rounded tensors, {_ranges('{}: {}', series, joint='; ')}.",
        labels=("layer", "‖W−Ŵ‖ ÷ ‖W‖"),
        series=series,
        y=linear_axis(y_values(series)),
    )


def site_charts(report: SiteReport) -> Iterator[Chart]:
    """Charts the worst op and the worst state of each layer in units of their limits."""
    ops = _worst_by_layer((e.layer, e.excess) for e in report.errors if e.state is None)
    states = _worst_by_layer((e.layer, e.excess) for e in report.errors if e.state is not None)
    kinds = ("plain", "worst op", ops), ("pale", "worst state", states)
    series = [Series(kind, label, points, dots=True) for kind, label, points in kinds if points]
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
        y=logarithmic_axis(y_values(series), limit.points[0][1]),
        limit=limit,
    )


def cost_charts(results: Sequence[Result]) -> Iterator[Chart]:
    """Charts KL to the original by size, if at least two artifacts have an original."""
    costs = sorted(
        (r.artifact.bytes / 1e6, cost.kl.mean, PurePath(r.artifact.path).name)
        for r in results
        if (cost := cost_of(r)) is not None and math.isfinite(cost.kl.mean)
    )
    if len(costs) < 2:
        return
    names = [name if len(name) <= _MOST_NAME else f"{name[:_MOST_NAME]}…" for *_, name in costs]
    points = [(size, kl) for size, kl, _ in costs]
    listed = "; ".join(f"{name}: {size:,.0f} MB, {number(kl)}" for size, kl, name in costs)
    yield Chart(
        title="What compression costs, by size",
        summary=f"Mean KL in nats per token against the size of the files. {listed}.",
        labels=("size, MB", "KL, nats per token"),
        series=[Series("original", "KL to the original", points, dots=True, names=names)],
        y=logarithmic_axis([kl for _, kl in points]),
        column="size, MB",
        show_x="{:,.1f}".format,
    )


def _lines(
    r: Result, points: Callable[[Comparison], Sequence[Point]], dots: bool = False
) -> list[Series]:
    """Returns a series of each comparison; the original's is drawn first, below the other."""
    sides = reversed(sides_of(r))
    return [Series(kind, LABELS[kind], points(side), dots) for kind, side in sides]


def _ranges(
    template: str, series: Sequence[Series], show: FormatNumber = number, joint: str = ", "
) -> str:
    return joint.join(template.format(line.label, _range(line.points, show)) for line in series)


def _range(points: Sequence[Point], show: FormatNumber) -> str:
    ys = [y for _, y in points if math.isfinite(y)]
    missing = len(points) - len(ys)
    text = f"{show(min(ys))} to {show(max(ys))}" if ys else "no finite value"
    return f"{text}, {missing} of {len(points)} not finite" if missing and ys else text


def _block_names(series: Series, end: int) -> FormatNumber:
    starts = [int(x) for x, _ in series.points]
    stops = dict(zip(starts, [*starts[1:], end], strict=True))
    return lambda x: f"{x:,}" if stops[int(x)] - x == 1 else f"{x:,}–{stops[int(x)] - 1:,}"


def _by_layer(values: Iterable[tuple[int | None, float]]) -> dict[int, list[float]]:
    """Groups values; those that belong to no layer are dropped."""
    groups: dict[int, list[float]] = defaultdict(list)
    for layer, value in values:
        if layer is not None:
            groups[layer].append(value)
    return groups


def _worst_by_layer(values: Iterable[tuple[int | None, float]]) -> list[Point]:
    """Returns the largest value of each layer; NaN if one is NaN."""
    return [(layer, float(np.max(group))) for layer, group in _by_layer(values).items()]


def rms(values: Sequence[float]) -> float:
    """Returns the root mean square."""
    return math.sqrt(sum(value * value for value in values) / len(values))
