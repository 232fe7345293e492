"""The outcome of `evaluate`: tables for a terminal, an HTML page, and JSON."""

import json
from pathlib import Path

from rgexport.evaluate.pieces import Result
from rgexport.evaluate.suites import SUITES
from rgexport.files.targets import replace_file
from rgexport.reporting import page
from rgexport.reporting.tables import render

JSON, PAGE = "evaluation.json", "evaluation.html"


def write_files(evaluation: Result, folder: Path) -> Path:
    """Writes all figures and the page to the folder of the results; returns the page."""
    figures = json.dumps(evaluation, indent=1, allow_nan=False) + "\n"
    for name, text in ((JSON, figures), (PAGE, render_page(evaluation))):
        with replace_file(folder / name, force=True, replaceable=lambda path: True) as file:
            file.write_text(text, "utf-8")
    return folder / PAGE


def as_text(evaluation: Result) -> str:
    models = evaluation["models"]
    return render(table for suite in models[0]["suites"] for table in SUITES[suite].tables(models))


def render_page(evaluation: Result) -> str:
    models = evaluation["models"]
    sections = [
        (suite.capitalize(), list(SUITES[suite].tables(models)), list(SUITES[suite].charts(models)))
        for suite in models[0]["suites"]
    ]
    return page.render_page(
        "evaluate",
        "evaluation.html.j2",
        title="What " + ", ".join(model["label"] for model in models) + " can do",
        sections=sections,
        environment=evaluation["environment"],
        json=JSON,
    )
