"""The charts of the states' errors along a text."""

from collections.abc import Iterator, Sequence

from rgexport.validate.measure import Comparison
from rgexport.validate.report.chart import Chart, Limit, Series, decade_ticks, logarithmic_scale
from rgexport.validate.report.picture_parts import all_ys, by_x, picture, sides, span, whole
from rgexport.validate.report.report_words import LABELS, number
from rgexport.validate.result import Result
from rgexport.validate.states import Drift, StateError, worst

_KINDS = {
    "rg_lru": "plain",
    "key": "plain dashed",
    "conv1d": "pale",
    "value": "pale dashed",
}
"""A kind of state → how its line is drawn."""
_MEASURE = "after so many tokens, relative to the largest value"


def drift_charts(r: Result) -> Iterator[Chart]:
    """Of a text that has a checkpoint inside, for a model that has states."""
    if any(side.drift and side.states for _, side in sides(r)):
        yield drift_chart(r)
    if r.twin is not None and r.twin.drift:
        limit = Limit("limit", _state_limit(r).at)
        title = f"Drift from the {LABELS['twin']}, by kind of state"
        yield from kinds_chart(title, _with_end(r, r.twin), limit)


def drift_chart(r: Result) -> Chart:
    """The worst state after 64, 128, … tokens and after the whole text."""
    series = [
        Series(kind, LABELS[kind], [(d.position, worst(d.states)) for d in _with_end(r, side)])
        for kind, side in sides(r)
    ]
    limit = _state_limit(r)
    at_end = number(limit.at(r.text.tokens))
    told = (f"from the {one.label}'s {span(one.points, number)}" for one in series)
    said = f"Largest error of any state {_MEASURE}: {', '.join(told)}; "
    return _chart(
        "Drift of the states",
        f"{said}the latter's limit is {at_end} at the end.",
        series,
        limit,
    )


def kinds_chart(title: str, drift: Sequence[Drift], limit: Limit | None = None) -> Iterator[Chart]:
    """The worst state of each kind; none for a model without states."""
    series = [
        Series(drawn, kind, [(d.position, worst(_of_kind(d, kind))) for d in drift])
        for kind, drawn in _KINDS.items()
        if _of_kind(drift[0], kind)
    ]
    if series:
        told = (f"{one.label} {span(one.points, number)}" for one in series)
        yield _chart(title, f"Largest error {_MEASURE}: {', '.join(told)}.", series, limit)


def _chart(title: str, summary: str, series: list[Series], limit: Limit | None) -> Chart:
    near = None if limit is None else limit.at(max(x for one in series for x, _ in one.points))
    return picture(
        title,
        summary,
        ("tokens, logarithmic", "max |Δ| ÷ max"),
        series,
        logarithmic_scale(all_ys(series), near),
        decade_ticks,
        limit=limit,
        rows=("tokens", by_x(series, whole, number)),
        doubling=True,
    )


def _state_limit(r: Result) -> Limit:
    return Limit(f"limit for the {LABELS['twin']}", lambda x: r.tolerance.at(round(x)).states)


def _with_end(r: Result, side: Comparison) -> list[Drift]:
    return [*side.drift, Drift(position=r.text.tokens, states=side.states)]


def _of_kind(drift: Drift, kind: str) -> list[StateError]:
    return [state for state in drift.states if state.name.endswith(f".{kind}")]
