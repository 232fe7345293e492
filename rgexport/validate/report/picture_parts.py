"""What the charts of a result are made with: the picture, its words and its table of numbers."""

import math
from collections.abc import Callable, Sequence

from rgexport.validate.measure import Comparison
from rgexport.validate.report.chart import Chart, Limit, Scale, Series, Tick, draw
from rgexport.validate.report.report_tables import sides_of
from rgexport.validate.result import Result

Show = Callable[[float], str]


def picture(
    title: str,
    summary: str,
    labels: tuple[str, str],
    series: Sequence[Series],
    scale: Scale,
    ticks: Callable[[Scale], list[Tick]],
    *,
    rows: tuple[str, Sequence[Sequence[str]]],
    limit: Limit | None = None,
    doubling: bool = False,
) -> Chart:
    """A chart.

    Args:
        title: what is drawn.
        summary: what there is to see, in words.
        labels: of x and y.
        series: the points.
        scale: of y.
        ticks: makes those of y.
        rows: what x is called in the table of numbers, and its rows.
        limit: of y.
        doubling: whether x is drawn by its logarithm.
    """
    drawn, x_ticks, line = draw(series, scale, limit, doubling=doubling)
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


def sides(r: Result) -> list[tuple[str, Comparison]]:
    """The original, which is drawn first, and the twin."""
    return sides_of(r)[::-1]


def all_ys(series: Sequence[Series]) -> list[float]:
    """Of all points."""
    return [y for one in series for _, y in one.points]


def by_x(series: Sequence[Series], name: Show, show: Show) -> list[list[str]]:
    """A row for each x: its name, and what each series has there."""
    values = [dict(one.points) for one in series]
    xs = sorted({x for one in values for x in one})
    return [[name(x), *(show(one[x]) if x in one else "" for one in values)] for x in xs]


def span(points: Sequence[tuple[float, float]], show: Show) -> str:
    """From which y to which, in words."""
    ys = [y for _, y in points if math.isfinite(y)]
    missing = len(points) - len(ys)
    said = f"{show(min(ys))} to {show(max(ys))}" if ys else "no finite value"
    return f"{said}, {missing} of {len(points)} not finite" if missing and ys else said


def whole(x: float) -> str:
    """A number that has no fraction."""
    return f"{x:,.0f}"


def worst(values: Sequence[float]) -> float:
    """The largest; NaN where one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)
