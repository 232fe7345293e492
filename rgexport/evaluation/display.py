"""Cells of tables and curves of charts that several suites have."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rgexport.evaluation.pieces import Result
from rgexport.reporting.chart import MARKS, Chart, Series, linear_axis, y_values
from rgexport.reporting.numbers import number

_LINE_STYLES = ("plain broad", "twin", "original", "third", "fourth", "fifth")
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
    by_suite = model.get("differences", {})
    if suite not in by_suite:
        return []
    entries: list[Result] = by_suite[suite][key]
    return entries


def loss_of(where: str, gap: Result, weight: float = 1) -> Loss:
    """Returns a difference of two models as the loss of the second one."""
    margin = None
    if gap["high"] is not None:
        margin = gap["high"] - gap["value"]
    return Loss(where, gap["value"], margin, weight)


def difference_cell(gap: Result | None) -> str:
    """Returns a difference and half of its interval; empty without one."""
    if gap is None:
        return ""
    value = f"{gap['value']:+.4f}"
    if gap["high"] is None:
        return value
    return f"{value} ± {gap['high'] - gap['value']:.4f}"


def is_significant(p: float | None) -> bool:
    """Returns whether a difference with this p is unlikely to be chance; not if p is unknown."""
    return p is not None and p < 0.05


def by_entry(models: Models, suite: str, key: str) -> Iterator[tuple[Result, ...]]:
    """Yields each entry of a list of figures, from all models."""
    lists = [model["suites"][suite][key] for model in models]
    return zip(*lists, strict=True)


def lines(models: Models, points: Iterable[Points]) -> list[Series]:
    """Returns a line with error bars for the points of each model."""
    return [
        _line(model, line, index, len(models))
        for index, (model, line) in enumerate(zip(models, points, strict=True))
    ]


def _line(model: Result, points: Points, index: int, num_models: int) -> Series:
    """Returns the line of the model at `index`; it is dashed where a style is used again."""
    values = []
    intervals = []
    for x, (value, low, high) in sorted(points, key=_x_and_figure):
        values.append((float(x), value))
        if low is not None:
            intervals.append((float(x), low, high))

    round_of_styles, style = divmod(index, len(_LINE_STYLES))
    kind = _LINE_STYLES[style]
    if round_of_styles:
        kind += " dashed"
    return Series(
        kind,
        model["label"],
        values,
        intervals=intervals,
        mark=list(MARKS)[style],
        shift=_APART * (index - (num_models - 1) / 2),
    )


def _x_and_figure(point: tuple[float, Sequence[Any]]) -> tuple[float, ...]:
    """Returns the key that sorts points by x, and those of one x by their values."""
    x, figure = point
    return (x, *figure)


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

    first = models[0]
    compared = [model is first or bool(lost(model)) for model in models]
    if sum(compared) < 2:
        return
    base = {at: figure[0] for at, figure in points[0]}
    gaps: list[Points] = []
    for line, is_compared in zip(points, compared, strict=True):
        if is_compared:
            gaps.append(_differences(line, base))
        else:
            gaps.append([])
    yield curves(
        f"{title}: difference",
        f"{summary} Differences to {first['label']}; the tables have their intervals.",
        (x, "more nats per token"),
        models,
        gaps,
    )


def _differences(points: Points, base: dict[float, float]) -> Points:
    """Returns points minus the base's value at the same x; without intervals."""
    return [(x, (figure[0] - base[x], None, None)) for x, figure in points]


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
