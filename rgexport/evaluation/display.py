"""Cells of tables and curves of charts that several suites have."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rgexport.evaluation.pieces import Result
from rgexport.reporting.chart import MARKS, Chart, Series, linear_axis, y_values
from rgexport.reporting.numbers import number

_LINES = "plain broad", "twin", "original", "third", "fourth", "fifth"
"""CSS classes of the models' lines, the first model's first."""
_APART = 4  # pixels between the models' marks at one x


class Loss(NamedTuple):
    """A model's loss in one place, and half of its 95 % interval; negative for a gain."""

    where: str
    value: float
    margin: float | None
    weight: float = 1


Models = Sequence[Result]
"""The figures of several models; the first is what the others are compared with."""
Points = Iterable[tuple[float, Sequence[Any]]]
"""x of each point of a curve, its value, and the ends of its interval, None if unknown."""


def differences_of(model: Result, suite: str, key: str) -> list[Result]:
    """Returns the differences of a model to the first one; none for the first itself."""
    entries: list[Result] = model.get("differences", {}).get(suite, {key: []})[key]
    return entries


def loss_of(where: str, gap: Result, weight: float = 1) -> Loss:
    margin = None if gap["high"] is None else gap["high"] - gap["value"]
    return Loss(where, gap["value"], margin, weight)


def difference_cell(gap: Result | None) -> str:
    """Returns a difference and half of its interval; empty without one."""
    if gap is None:
        return ""
    error = "" if gap["high"] is None else f" ± {gap['high'] - gap['value']:.4f}"
    return f"{gap['value']:+.4f}{error}"


def is_significant(p: float | None) -> bool:
    return p is not None and p < 0.05


def by_entry(models: Models, suite: str, key: str) -> Iterator[tuple[Result, ...]]:
    """Yields each entry of a list of figures, from all models."""
    return zip(*(model["suites"][suite][key] for model in models), strict=True)


def lines(models: Models, points: Iterable[Points]) -> list[Series]:
    """Returns a line with error bars for the points of each model."""
    series = []
    for index, (model, line) in enumerate(zip(models, points, strict=True)):
        again, style = divmod(index, len(_LINES))
        rows = sorted((float(x), *value) for x, value in line)
        series.append(
            Series(
                _LINES[style] + (" dashed" if again else ""),
                model["label"],
                [(x, value) for x, value, _, _ in rows],
                intervals=[(x, low, high) for x, _, low, high in rows if low is not None],
                mark=list(MARKS)[style],
                shift=_APART * (index - (len(models) - 1) / 2),
            )
        )
    return series


def loss_curves(
    title: str,
    summary: str,
    x: str,
    models: Models,
    points: Sequence[Points],
    lost: Callable[[Result], Sequence[Loss]],
) -> Iterator[Chart]:
    """Yields a chart of losses, and one of what models lose if `lost` says that they compare."""
    yield curves(title, summary, (x, "nats per token"), models, points)
    compared = [model is models[0] or bool(lost(model)) for model in models]
    if sum(compared) > 1:
        first = {x: nats for x, (nats, *_) in points[0]}
        gaps = [
            [(x, (nats - first[x], None, None)) for x, (nats, *_) in line if is_compared]
            for line, is_compared in zip(points, compared, strict=True)
        ]
        title, first_label = f"{title}: difference", models[0]["label"]
        summary = f"{summary} Differences to {first_label}; the tables have their intervals."
        yield curves(title, summary, (x, "more nats per token"), models, gaps)


def curves(
    title: str, summary: str, labels: tuple[str, str], models: Models, points: Iterable[Points]
) -> Chart:
    """Returns a chart with a line for each model; x is drawn by its logarithm."""
    series = lines(models, points)
    return Chart(
        title=title,
        summary=summary,
        labels=labels,
        series=series,
        y=linear_axis(y_values(series)),
        show_y=number,
        doubling=True,
    )
