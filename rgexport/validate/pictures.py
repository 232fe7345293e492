"""The charts of a result."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from rgexport.validate.chart import (
    Chart,
    Scale,
    Series,
    Tick,
    decade_ticks,
    draw,
    fifth_ticks,
    linear_scale,
    logarithmic_scale,
    share_scale,
    share_ticks,
)
from rgexport.validate.measure import Comparison
from rgexport.validate.positions import PositionBlock
from rgexport.validate.report import number, percent
from rgexport.validate.result import Result
from rgexport.validate.weights import WeightError

AGREEMENT_BLOCKS = 32
"""A share needs more positions than a mean of KL before it says something."""


def charts(r: Result) -> Iterator[Chart]:
    """All that can be drawn of a result."""
    yield kl_chart(r)
    yield agreement_chart(r)
    if r.twin.states:
        yield state_chart(r)
    rounded = [error for error in r.weights or [] if error.max_steps != 0]
    if any(_layer(error.name) is not None for error in rounded):
        yield weight_chart(rounded)


def kl_chart(r: Result) -> Chart:
    """KL along the text."""
    series = [
        Series(kind, kind, [(b.start, b.kl_mean) for b in side.blocks]) for kind, side in _sides(r)
    ]
    rows = _by_x(series, _span_of(r.twin.blocks), number)
    told = (f"against the {kind} {_range(one.points, number)}" for kind, one in _named(series))
    return _chart(
        "KL by position",
        f"Mean KL per block of positions, {', '.join(told)}.",
        ("position in the text", "KL, nats"),
        series,
        logarithmic_scale([y for one in series for _, y in one.points]),
        decade_ticks,
        rows=("positions", rows),
    )


def agreement_chart(r: Result) -> Chart:
    """The share of equal first choices along the text."""
    sides = [(kind, _merged(side.blocks)) for kind, side in _sides(r)]
    series = [Series(kind, kind, [(b.start, b.top1) for b in blocks]) for kind, blocks in sides]
    rows = _by_x(series, _span_of(sides[0][1]), percent)
    told = (f"with the {kind} {_range(one.points, percent)}" for kind, one in _named(series))
    return _chart(
        "Same first choice by position",
        f"Share of positions with the same first choice, {', '.join(told)}.",
        ("position in the text", "same first choice"),
        series,
        share_scale([y for one in series for _, y in one.points]),
        share_ticks,
        rows=("positions", rows),
    )


def state_chart(r: Result) -> Chart:
    """The worst state of each layer after the last token."""
    series = []
    for kind, side in _sides(r):
        found: dict[int, list[float]] = defaultdict(list)
        for state in side.states:
            if (layer := _layer(state.name)) is not None:
                found[layer].append(state.relative_max)
        series.append(Series(kind, kind, [(x, _worst(ys)) for x, ys in found.items()], dots=True))
    limit = r.tolerance.states
    told = (f"from the {kind}'s {_range(one.points, number)}" for kind, one in _named(series))
    return _chart(
        "Error of the states by layer",
        f"Largest error of each layer's states after the last token, relative to the largest "
        f"value: {', '.join(told)}; the twin's limit is {number(limit)}.",
        ("layer", "max |Δ| ÷ max"),
        series,
        logarithmic_scale([y for one in series for _, y in one.points], limit),
        decade_ticks,
        limit=(limit, "limit for the twin"),
        rows=("layer", _by_x(series, lambda x: f"{x:g}", number)),
    )


def weight_chart(weights: Sequence[WeightError]) -> Chart:
    """The relative error of each layer's rounded weights."""
    found: dict[int, list[float]] = defaultdict(list)
    for error in weights:
        if (layer := _layer(error.name)) is not None:
            found[layer].append(error.relative_error)
    series = [
        Series("original", "worst tensor", [(x, _worst(ys)) for x, ys in found.items()], True),
        Series("twin", "root mean square", [(x, _rms(ys)) for x, ys in found.items()], True),
    ]
    told = (f"{name}: {_range(one.points, number)}" for name, one in _named(series))
    return _chart(
        "Error of the weights by layer",
        f"Relative error of the rounded tensors, {'; '.join(told)}.",
        ("layer", "‖W−Ŵ‖ ÷ ‖W‖"),
        series,
        linear_scale([y for one in series for _, y in one.points]),
        fifth_ticks,
        rows=("layer", _by_x(series, lambda x: f"{x:g}", number)),
    )


def _chart(
    title: str,
    summary: str,
    labels: tuple[str, str],
    series: Sequence[Series],
    scale: Scale,
    ticks: Callable[[Scale], list[Tick]],
    *,
    rows: tuple[str, Sequence[Sequence[str]]],
    limit: tuple[float, str] | None = None,
) -> Chart:
    drawn, x_ticks, line = draw(series, scale, limit)
    return Chart(
        title=title,
        summary=summary,
        x_label=labels[0],
        y_label=labels[1],
        x_ticks=x_ticks,
        y_ticks=ticks(scale),
        series=drawn,
        limit=line,
        header=(rows[0], *(one.label for one in series)),
        rows=rows[1],
    )


def _sides(r: Result) -> Iterator[tuple[str, Comparison]]:
    if r.original is not None:
        yield "original", r.original
    yield "twin", r.twin


def _named(series: Iterable[Series]) -> Iterator[tuple[str, Series]]:
    return ((one.label, one) for one in series)


def _layer(name: str) -> int | None:
    """Of `layers.12.rg_lru`, 12."""
    first, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    return int(index) if first == "layers" and index.isdigit() else None


def _merged(blocks: Sequence[PositionBlock]) -> list[PositionBlock]:
    """Neighbouring blocks as one, so that there are at most `AGREEMENT_BLOCKS`."""
    together = math.ceil(len(blocks) / AGREEMENT_BLOCKS)
    groups = (blocks[start : start + together] for start in range(0, len(blocks), together))
    return [_merge(group) for group in groups]


def _merge(blocks: Sequence[PositionBlock]) -> PositionBlock:
    start, stop = blocks[0].start, blocks[-1].stop

    def mean(field: str) -> float:
        total = sum(getattr(b, field) * (b.stop - b.start) for b in blocks)
        return float(total / (stop - start))

    return PositionBlock(
        start=start,
        stop=stop,
        kl_mean=mean("kl_mean"),
        kl_max=_worst([b.kl_max for b in blocks]),
        top1=mean("top1"),
    )


def _span_of(blocks: Sequence[PositionBlock]) -> Callable[[float], str]:
    spans = {
        b.start: f"{b.start:,}–{b.stop - 1:,}" if b.stop - b.start > 1 else f"{b.start:,}"
        for b in blocks
    }
    return lambda start: spans[int(start)]


def _by_x(
    series: Sequence[Series], name: Callable[[float], str], show: Callable[[float], str]
) -> list[list[str]]:
    values = [dict(one.points) for one in series]
    xs = sorted({x for one in values for x in one})
    return [[name(x), *(show(one[x]) if x in one else "" for one in values)] for x in xs]


def _range(points: Sequence[tuple[float, float]], show: Callable[[float], str]) -> str:
    ys = [y for _, y in points if math.isfinite(y)]
    missing = len(points) - len(ys)
    said = f"{show(min(ys))} to {show(max(ys))}" if ys else "no finite value"
    return f"{said}, {missing} of {len(points)} not finite" if missing and ys else said


def _worst(values: Sequence[float]) -> float:
    """NaN where one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))
