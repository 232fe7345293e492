"""Cells of tables and curves of charts that several suites have."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle

from rgexport.evaluate.pieces import Result
from rgexport.reporting.chart import Chart, Series, linear_axis, y_values
from rgexport.reporting.numbers import number

_LINES = "plain", "twin", "original", "pale", "twin dashed", "original dashed", "plain dashed"
"""CSS classes of the models' lines, the first model's first."""
Models = Sequence[Result]
"""The figures of several models; the first is what the others are compared with."""
Value = Sequence[float | None]
"""A value, and the low and high end of its interval, None if unknown."""
Points = Iterable[tuple[float, Value]]
"""x and value of each point of a curve."""


def differences_of(model: Result, suite: str, key: str) -> list[Result]:
    """Returns the differences of a model to the first one; none for the first itself."""
    entries: list[Result] = model.get("differences", {}).get(suite, {key: []})[key]
    return entries


def difference_cell(gap: Result | None) -> str:
    """Returns a difference and half of its interval; empty without one."""
    if gap is None:
        return ""
    error = "" if gap["high"] is None else f" ± {gap['high'] - gap['value']:.4f}"
    return f"{gap['value']:+.4f}{error}"


def is_significant(p: float | None) -> bool:
    return p is not None and p < 0.05


def ends(estimate: Result) -> Value:
    return estimate["value"], estimate["low"], estimate["high"]


def by_entry(models: Models, suite: str, key: str) -> Iterator[tuple[Result, ...]]:
    """Yields each entry of a list of figures, from all models."""
    return zip(*(model["suites"][suite][key] for model in models), strict=True)


def lines(models: Models, points: Iterable[Points]) -> list[Series]:
    """Returns a line with error bars for the points of each model."""
    series = []
    for kind, model, one in zip(cycle(_LINES), models, points):
        line, bars = [], []
        for x, (value, low, high) in one:
            assert value is not None
            line.append((float(x), value))
            if low is not None and high is not None:
                bars.append((float(x), low, high))
        series.append(Series(kind, model["label"], sorted(line), intervals=bars))
    return series


def curves(
    title: str,
    summary: str,
    labels: tuple[str, str],
    models: Models,
    points: Iterable[Points],
    column: str | None = None,
) -> Chart:
    """Returns a chart with a line for each model; x is drawn by its logarithm."""
    series = lines(models, points)
    return Chart(
        title=title,
        summary=summary,
        labels=labels,
        series=series,
        y=linear_axis(y_values(series)),
        column=column or labels[0],
        show_y=number,
        doubling=True,
    )
