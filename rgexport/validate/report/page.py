"""The outcome of `validate` as one HTML page, and its charts."""

import math
from collections.abc import Sequence

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
    filters = amount, number, percent, piece, site_evidence
    environment.filters |= {f.__name__: f for f in filters}
    shared = {"sentences": sentences, "tables": tables, "kl_chart": kl_chart, "grades": GRADES}
    environment.globals |= shared
    return environment.get_template("page.html.j2").render(
        results=results, verdict=verdict(check for result in results for check in result.checks)
    )


def piece(text: str) -> str:
    """Returns the text of a token on one line, with visible spaces."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def kl_chart(r: ValidationResult) -> Chart:
    sides = [(kind, sentences.LABELS[kind], side) for kind, side in reversed(tables.sides_of(r))]
    series = [Series(k, label, [(b.start, b.kl_mean) for b in s.blocks]) for k, label, s in sides]
    spans = {b.start: f"{b.start:,}–{b.stop - 1:,}" for b in r.dequantized.blocks}
    spans |= {b.start: f"{b.start:,}" for b in r.dequantized.blocks if b.stop - b.start == 1}
    ranges = ", ".join(f"against the {line.label} {_range(line)}" for line in series)
    return Chart(
        title="KL by position",
        summary=f"Mean KL per block of positions, {ranges}.",
        labels=("position in the text", "KL, nats"),
        series=series,
        y=logarithmic_axis(y_values(series)),
        column="positions",
        show_x=lambda x: spans[int(x)],
    )


def _range(line: Series) -> str:
    ys = [y for _, y in line.points if math.isfinite(y)]
    return f"{number(min(ys))} to {number(max(ys))}" if ys else "no finite value"
