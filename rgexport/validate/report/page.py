"""The outcome of `validate` as one HTML page, and its charts."""

import math
from collections.abc import Sequence
from itertools import chain

from rgexport.reporting.chart import Chart, Series, logarithmic_axis, y_values
from rgexport.reporting.numbers import number, percent
from rgexport.reporting.page import page_environment, visible
from rgexport.units import amount
from rgexport.validate.bisect.suspects import site_evidence
from rgexport.validate.checks import GRADES, verdict
from rgexport.validate.report import sentences, tables
from rgexport.validate.result import ValidationResult


def render_page(results: Sequence[ValidationResult]) -> str:
    """Returns the page: the verdict first, then a table of the artifacts if they are several."""
    environment = page_environment("validate.report")
    for function in (amount, number, percent, piece, site_evidence):
        environment.filters[function.__name__] = function
    environment.globals["sentences"] = sentences
    environment.globals["tables"] = tables
    environment.globals["kl_chart"] = kl_chart
    environment.globals["grades"] = GRADES
    checks = chain.from_iterable(result.checks for result in results)
    template = environment.get_template("page.html.j2")
    return template.render(results=results, verdict=verdict(checks))


def piece(text: str) -> str:
    """Returns the text of a token on one line, with visible spaces."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def kl_chart(r: ValidationResult) -> Chart:
    """Returns the chart of the mean KL by position, a line for each comparison."""
    series = []
    for kind, side in reversed(tables.sides_of(r)):
        points = [(block.start, block.kl_mean) for block in side.blocks]
        series.append(Series(kind, sentences.LABELS[kind], points))

    positions_of_start = {}
    for block in r.dequantized.blocks:
        text = f"{block.start:,}"
        if block.stop - block.start > 1:
            text += f"–{block.stop - 1:,}"
        positions_of_start[block.start] = text

    ranges = ", ".join(f"against the {line.label} {_range(line)}" for line in series)
    return Chart(
        title="KL by position",
        summary=f"Mean KL per block of positions, {ranges}.",
        labels=("position in the text", "KL, nats"),
        series=series,
        y=logarithmic_axis(y_values(series)),
        column="positions",
        show_x=lambda x: positions_of_start[int(x)],
    )


def _range(line: Series) -> str:
    ys = [y for _, y in line.points if math.isfinite(y)]
    if not ys:
        return "no finite value"
    return f"{number(min(ys))} to {number(max(ys))}"
