"""The outcome of `evaluate`: a verdict and tables for a terminal, an HTML page, and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rgexport import progress
from rgexport.evaluation.display import Models
from rgexport.evaluation.pieces import Result
from rgexport.evaluation.suites import SUITES
from rgexport.evaluation.verdict import verdict
from rgexport.files.targets import replace_file
from rgexport.reporting import page
from rgexport.reporting.chart import Chart
from rgexport.reporting.tables import Table, render

JSON = "evaluation.json"
PAGE = "evaluation.html"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The figures of an evaluation, as in `evaluation.json`, and the folder of that file."""

    figures: Result
    folder: Path

    @property
    def page(self) -> Path:
        """The HTML page with tables and charts."""
        return self.folder / PAGE

    @property
    def verdict(self) -> str:
        """The conclusion, and at most four lines with its reasons."""
        judged = verdict(self.figures["models"])
        return "\n".join([judged.conclusion, *judged.reasons])

    def __repr__(self) -> str:
        return f"<Evaluation {self.folder}: {verdict(self.figures['models']).conclusion}>"


def write_files(evaluation: Result, folder: Path) -> Path:
    """Writes all figures and the page to the folder of the results; returns the page."""
    figures = json.dumps(evaluation, indent=1, allow_nan=False, default=str)
    html = render_page(evaluation)
    _replace(folder / JSON, f"{figures}\n")
    _replace(folder / PAGE, html)
    return folder / PAGE


def _replace(path: Path, text: str) -> None:
    """Writes a file, perhaps over that of an earlier run: the folder belongs to `evaluate`."""
    with replace_file(path, force=True, replaceable=lambda path: True) as file:
        file.write_text(text, "utf-8")


def as_text(evaluation: Result) -> str:
    """Returns the verdict; with `-v`, or without a comparison, all tables, too."""
    models = evaluation["models"]
    judged = verdict(models)
    blocks: list[str | Table] = [judged.conclusion, *judged.reasons]
    if progress.verbose or not judged.reasons:
        blocks.append("")
        for suite in models[0]["suites"]:
            blocks += SUITES[suite].tables(models)
    return render(blocks)


class _Section(NamedTuple):
    """A suite on the page; the template unpacks it in this order."""

    title: str
    meaning: str
    tables: list[Table]
    charts: list[Chart]


def render_page(evaluation: Result) -> str:
    """Returns the HTML page with the verdict, and a section for each suite."""
    models = evaluation["models"]
    labels = [model["label"] for model in models]
    return page.render_page(
        "evaluation",
        "evaluation.html.j2",
        title="Evaluation of " + " and ".join(labels),
        verdict=verdict(models),
        first=labels[0],
        sections=[_section(suite, models) for suite in models[0]["suites"]],
        environment=evaluation["environment"],
        json=JSON,
    )


def _section(name: str, models: Models) -> _Section:
    """Returns a suite's section; its meaning is what follows the name in the module's docstring."""
    suite = SUITES[name]
    first_line = (suite.__doc__ or "").splitlines()[0]
    meaning = first_line.partition(": ")[2]
    tables = list(suite.tables(models))
    charts = list(suite.charts(models))
    return _Section(name.capitalize(), meaning, tables, charts)
