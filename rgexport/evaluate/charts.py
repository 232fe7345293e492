"""The curves of suites as charts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle

from rgexport.evaluate.pieces import Result
from rgexport.evaluate.tables import by_window
from rgexport.reporting.chart import Chart, Point, Series, linear_axis, share_axis, y_values
from rgexport.reporting.numbers import number, percent

_LINES = "plain", "twin", "original", "pale", "twin dashed", "original dashed", "plain dashed"
"""CSS classes of the models' lines, the first model's first."""
Models = Sequence[Result]
Value = tuple[float, float | None, float | None]
"""A value with the low and high end of its interval, None if unknown."""


def _curves(
    title: str,
    summary: str,
    labels: tuple[str, str],
    column: str,
    models: Models,
    points: Callable[[Result], Iterable[tuple[float, Value]]],
) -> Chart:
    """Returns a chart with a line for each model; x is drawn by its logarithm.

    `points` returns x and value of each point, from the figures of a model.
    """
    series = [_series(kind, m["label"], points(m)) for kind, m in zip(cycle(_LINES), models)]
    return Chart(
        title=title,
        summary=summary,
        labels=labels,
        series=series,
        y=linear_axis(y_values(series)),
        column=column,
        show_y=number,
        doubling=True,
    )


def _series(kind: str, label: str, points: Iterable[tuple[float, Value]]) -> Series:
    points = list(points)
    line: list[Point] = sorted((float(x), value) for x, (value, _, _) in points)
    bars = [
        (float(x), low, high)
        for x, (_, low, high) in points
        if low is not None and high is not None
    ]
    return Series(kind, label, line, intervals=bars)


def _ends(estimate: Result) -> Value:
    return estimate["value"], estimate["low"], estimate["high"]


def _text_charts(models: Models) -> Iterator[Chart]:
    yield _curves(
        "Loss by position",
        "Mean loss of tokens from each power of two on, from the start of a document.",
        ("tokens before", "nats per token"),
        "tokens before",
        models,
        # The first tokens of a document have no power of two.
        lambda model: (
            (max(point["from"], 32), point["nll"])
            for point in model["suites"]["text"]["by_position"]
        ),
    )


def _memory_charts(models: Models) -> Iterator[Chart]:
    for task, first in enumerate(models[0]["suites"]["memory"]["tasks"]):
        curves = [model["suites"]["memory"]["tasks"][task]["points"] for model in models]
        series = [
            _series(kind, model["label"], ((point["distance"], _ends(point)) for point in curve))
            for kind, model, curve in zip(cycle(_LINES), models, curves)
        ]
        ends = [series[0].points[index][0] for index in (0, -1)]
        chance = first["chance"]
        yield Chart(
            title=first["task"],
            summary="Share of right answers by the tokens in between; "
            f"{percent(chance)} by chance.",
            labels=("tokens in between", "right answers"),
            series=series,
            y=share_axis([low for line in series for _, low, _ in line.intervals]),
            column="tokens in between",
            show_y=percent,
            limit=Series("limit", "chance", [(x, chance) for x in ends]),
            doubling=True,
        )


def _noise_charts(models: Models) -> Iterator[Chart]:
    """Charts for each kind of noise how fast it is forgotten."""
    for index, first in enumerate(models[0]["suites"]["noise"]["noises"]):
        if first["noise"] == "none":
            continue

        def points(model: Result, index: int = index) -> Iterator[tuple[float, Value]]:
            for point in model["suites"]["noise"]["noises"][index]["by_distance"]:
                yield point["token"], _ends(point["more"])

        yield _curves(
            f"After {first['noise']}",
            "More nats per token than after the clean text, from that token on.",
            ("tokens after the noise", "more nats"),
            "token",
            models,
            points,
        )


def _window_charts(models: Models) -> Iterator[Chart]:
    """Charts the loss by window, and the memory with each window of each model."""
    yield _curves(
        "Loss by window",
        "Mean loss of all texts; a window of 0 is drawn at 1.",
        ("tokens of the window", "nats per token"),
        "window",
        models,
        lambda model: (
            (max(1, row["window"]), row["all_texts"]["nll"])
            for row in model["suites"]["window"]["windows"]
        ),
    )
    for model in models:
        for chart in _memory_charts(by_window(model)):
            yield replace(chart, title=f"{model['label']}: {chart.title}")


def _length_charts(models: Models) -> Iterator[Chart]:
    """Charts loss, norm and time by the tokens read."""
    if len(models[0]["suites"]["length"]["points"]) < 2:
        return
    values: tuple[tuple[str, str, Callable[[Result], Value | None]], ...] = (
        ("Loss by length", "nats per token", lambda point: point["nll"]),
        (
            "Largest norm of a recurrent state",
            "norm",
            lambda p: (max(p["norms"].values()), None, None) if p["norms"] else None,
        ),
        ("Time of a step", "ms", lambda point: (1000 * point["step_seconds"], None, None)),
    )
    for title, unit, value_of in values:

        def points(
            model: Result, value_of: Callable[[Result], Value | None] = value_of
        ) -> Iterator[tuple[float, Value]]:
            for point in model["suites"]["length"]["points"]:
                if (value := value_of(point)) is not None:
                    yield point["to"], value

        yield _curves(
            title,
            "By the tokens of one text that were read before, its state carried on.",
            ("tokens", unit),
            "tokens",
            models,
            points,
        )


CHARTS: dict[str, Callable[[Models], Iterable[Chart]]] = {
    "text": _text_charts,
    "memory": _memory_charts,
    "noise": _noise_charts,
    "window": _window_charts,
    "length": _length_charts,
    "tasks": lambda models: [],
}
"""Suite → its charts."""
