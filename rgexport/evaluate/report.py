"""The outcome of `evaluate`: tables for a terminal, an HTML page, and JSON."""

import json
from pathlib import Path

from rgexport.evaluate.charts import CHARTS
from rgexport.evaluate.pieces import Result
from rgexport.evaluate.tables import TABLES
from rgexport.files.targets import replace_file
from rgexport.reporting import page
from rgexport.reporting.tables import render

JSON, PAGE = "evaluation.json", "evaluation.html"


def write_files(evaluation: Result, folder: Path) -> Path:
    """Writes all figures and the page to the folder of the results; returns the page."""
    _write(folder / JSON, json.dumps(evaluation, indent=1, allow_nan=False) + "\n")
    _write(folder / PAGE, render_page(evaluation, JSON))
    return folder / PAGE


def _write(target: Path, text: str) -> None:
    with replace_file(target, force=True, replaceable=lambda path: True) as file:
        file.write_text(text, "utf-8")


def as_text(evaluation: Result) -> str:
    """Returns the tables of all suites."""
    models = evaluation["models"]
    return render(table for suite in models[0]["suites"] for table in TABLES[suite](models))


def render_page(evaluation: Result, json_name: str) -> str:
    """Returns the page; `json_name` is the file beside it that has the numbers."""
    models = evaluation["models"]
    sections = [
        (suite.capitalize(), list(TABLES[suite](models)), list(CHARTS[suite](models)))
        for suite in models[0]["suites"]
    ]
    return page.render_page(
        "evaluate",
        "evaluation.html.j2",
        title="What " + ", ".join(model["label"] for model in models) + " can do",
        sections=sections,
        environment=evaluation["environment"],
        json=json_name,
    )
