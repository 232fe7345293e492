"""What was found as one HTML page that needs nothing else, neither network nor script."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

from rgexport import __version__
from rgexport.evaluate.pieces import Result
from rgexport.evaluate.tables import memory_tables, noise_table, text_table
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
    if "text" in models[0]["suites"]:
        yield Section("Texts", [text_table(models)], [_position_chart(models)])
    if "memory" in models[0]["suites"]:
        tasks = range(len(models[0]["suites"]["memory"]["tasks"]))
        charts = [_memory_chart(models, task) for task in tasks]
        yield Section("Memory", list(memory_tables(models)), charts)
    if "noise" in models[0]["suites"]:
        yield Section("Noise", [noise_table(models)], [])


def _position_chart(models: Sequence[Result]) -> Chart:
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
    return Chart(
        title="Loss by position",
        summary="Mean loss of tokens from each power of two on, from the start of a document.",
        labels=("tokens before", "nats per token"),
        series=series,
        y=linear_axis([y for one in series for _, y in one.points]),
        column="tokens before",
        show_y=number,
        doubling=True,
    )


def _start(point: Result) -> float:
    """Where a point is drawn: the first tokens of a document have no power of two."""
    return float(max(point["from"], 32))


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
