"""What was found as one HTML page that needs nothing else, neither network nor script."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from rgexport._version import __version__
from rgexport.evaluate.pieces import Result
from rgexport.evaluate.tables import TABLES, by_window
from rgexport.tables import Table
from rgexport.validate.report.chart import Chart, Series, linear_axis, share_axis
from rgexport.validate.report.page import templates_of
from rgexport.validate.report.words import number, percent

_LINES = "plain", "twin", "original", "pale", "twin dashed", "original dashed", "plain dashed"
"""CSS classes of the models' lines, the first model's first."""


@dataclass(frozen=True)
class Section:
    """A suite."""

    title: str
    tables: Sequence[Table]
    charts: Sequence[Chart]


def render_page(found: Result, json_name: str) -> str:
    """The page; `json_name` is the file beside it that has the numbers."""
    models = found["models"]
    return (
        templates_of("evaluate")
        .get_template("evaluation.html.j2")
        .render(
            title="What " + ", ".join(model["label"] for model in models) + " can do",
            sections=list(_sections(models)),
            environment=found["environment"],
            json=json_name,
            rgexport=__version__,
        )
    )


def _sections(models: Sequence[Result]) -> Iterator[Section]:
    for suite in models[0]["suites"]:
        charts = _CHARTS.get(suite, lambda models: [])
        yield Section(suite.capitalize(), list(TABLES[suite](models)), list(charts(models)))


def _position_chart(models: Sequence[Result]) -> Iterator[Chart]:
    series = [
        Series(
            kind,
            model["label"],
            [(_start(point), point["nll"][0]) for point in curve],
            intervals=[(_start(p), *p["nll"][1:]) for p in curve if p["nll"][1] is not None],
        )
        for kind, model in zip(cycle(_LINES), models, strict=False)
        for curve in [model["suites"]["text"]["by_position"]]
    ]
    yield _lines(
        "Loss by position",
        "Mean loss of tokens from each power of two on, from the start of a document.",
        ("tokens before", "nats per token"),
        "tokens before",
        series,
    )


def _lines(
    title: str, summary: str, labels: tuple[str, str], column: str, series: Sequence[Series]
) -> Chart:
    """Numbers by tokens, which are drawn by their logarithm; see `Chart`."""
    return Chart(
        title=title,
        summary=summary,
        labels=labels,
        series=series,
        y=linear_axis([y for one in series for _, y in one.points]),
        column=column,
        show_y=number,
        doubling=True,
    )


def _start(point: Result) -> float:
    """Where a point is drawn: the first tokens of a document have no power of two."""
    return float(max(point["from"], 32))


def _memory_charts(models: Sequence[Result]) -> Iterator[Chart]:
    for task in range(len(models[0]["suites"]["memory"]["tasks"])):
        yield _memory_chart(models, task)


def _memory_chart(models: Sequence[Result], task: int) -> Chart:
    curves = [model["suites"]["memory"]["tasks"][task] for model in models]
    series = [
        Series(
            kind,
            model["label"],
            [(point["distance"], point["value"]) for point in curve["points"]],
            intervals=[(p["distance"], p["low"], p["high"]) for p in curve["points"]],
        )
        for kind, model, curve in zip(cycle(_LINES), models, curves, strict=False)
    ]
    ends = [series[0].points[index][0] for index in (0, -1)]
    chance = curves[0]["chance"]
    return Chart(
        title=curves[0]["task"],
        summary=f"Share of right answers by the tokens in between; {percent(chance)} by chance.",
        labels=("tokens in between", "right answers"),
        series=series,
        y=share_axis([low for one in series for _, low, _ in one.intervals]),
        column="tokens in between",
        show_y=percent,
        limit=Series("limit", "chance", [(x, chance) for x in ends]),
        doubling=True,
    )


def _noise_charts(models: Sequence[Result]) -> Iterator[Chart]:
    """For each kind of noise, how fast it is forgotten."""
    for index, first in enumerate(models[0]["suites"]["noise"]["noises"]):
        if first["noise"] == "none":
            continue
        series = []
        for kind, model in zip(cycle(_LINES), models, strict=False):
            curve = model["suites"]["noise"]["noises"][index]["by_distance"]
            points = [(float(point["token"]), point["more"]["value"]) for point in curve]
            known = (p for p in curve if p["more"]["low"] is not None)
            bars = [(float(p["token"]), p["more"]["low"], p["more"]["high"]) for p in known]
            series.append(Series(kind, model["label"], points, intervals=bars))
        yield _lines(
            f"After {first['noise']}",
            "More nats per token than after the clean text, from that token on.",
            ("tokens after the noise", "more nats"),
            "token",
            series,
        )


def _window_charts(models: Sequence[Result]) -> Iterator[Chart]:
    """Loss by window, and memory with the windows of each model."""
    yield _loss_by_window(models)
    for model in models:
        for chart in _memory_charts(by_window(model)):
            yield replace(chart, title=f"{model['label']}: {chart.title}")


def _loss_by_window(models: Sequence[Result]) -> Chart:
    series = []
    for kind, model in zip(cycle(_LINES), models, strict=False):
        rows = model["suites"]["window"]["windows"]
        losses = [(float(max(1, row["window"])), row["all_texts"]["nll"]) for row in rows]
        points = sorted((window, nll[0]) for window, nll in losses)
        bars = [(window, *nll[1:]) for window, nll in losses if nll[1] is not None]
        series.append(Series(kind, model["label"], points, intervals=bars))
    return _lines(
        "Loss by window",
        "Mean loss of all texts; a window of 0 is drawn at 1.",
        ("tokens of the window", "nats per token"),
        "window",
        series,
    )


def _length_charts(models: Sequence[Result]) -> Iterator[Chart]:
    """Loss, norm and time by tokens read."""
    if len(models[0]["suites"]["length"]["points"]) < 2:
        return
    for title, unit, of in (
        ("Loss by length", "nats per token", _loss),
        ("Largest norm of a recurrent state", "norm", _largest_norm),
        ("Time of a step", "ms", lambda point: 1000 * point["step_seconds"]),
    ):
        series = [
            Series(
                kind,
                model["label"],
                _curve(points, of),
                intervals=_bars(points) if of is _loss else (),
            )
            for kind, model in zip(cycle(_LINES), models, strict=False)
            for points in [model["suites"]["length"]["points"]]
        ]
        yield _lines(
            title,
            "By the tokens of one text that were read before, its state carried on.",
            ("tokens", unit),
            "tokens",
            series,
        )


def _curve(
    points: Sequence[Result], of: Callable[[Result], float | None]
) -> list[tuple[float, float]]:
    return [(float(point["to"]), y) for point in points if (y := of(point)) is not None]


def _bars(points: Sequence[Result]) -> list[tuple[float, float, float]]:
    known = (point for point in points if point["nll"][1] is not None)
    return [(float(point["to"]), *point["nll"][1:]) for point in known]


def _loss(point: Result) -> float | None:
    value: float = point["nll"][0]
    return value


def _largest_norm(point: Result) -> float | None:
    return max(point["norms"].values()) if point["norms"] else None


_CHARTS: dict[str, Callable[[Sequence[Result]], Iterable[Chart]]] = {
    "text": _position_chart,
    "memory": _memory_charts,
    "noise": _noise_charts,
    "window": _window_charts,
    "length": _length_charts,
}
"""Suite → its charts; some have tables alone."""
