"""The outcome of `evaluate`: a verdict and tables for a terminal, an HTML page, and JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from rgexport import progress
from rgexport.evaluation.pieces import Result
from rgexport.evaluation.suites import SUITES
from rgexport.evaluation.verdict import verdict
from rgexport.files.targets import replace_file
from rgexport.reporting import page
from rgexport.reporting.tables import Table, render

JSON, PAGE = "evaluation.json", "evaluation.html"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The figures of an evaluation, as in `evaluation.json`, and the folder of that file."""

    figures: Result
    folder: Path

    @property
    def page(self) -> Path:
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
    figures = json.dumps(evaluation, indent=1, allow_nan=False, default=str) + "\n"
    for name, text in ((JSON, figures), (PAGE, render_page(evaluation))):
        with replace_file(folder / name, force=True, replaceable=lambda path: True) as file:
            file.write_text(text, "utf-8")
    return folder / PAGE


def as_text(evaluation: Result) -> str:
    """Returns the verdict; with `-v`, or without a comparison, all tables, too."""
    models = evaluation["models"]
    judged = verdict(models)
    blocks: list[str | Table] = [judged.conclusion, *judged.reasons]
    if progress.verbose or not judged.reasons:
        blocks.append("")
        blocks += [table for suite in models[0]["suites"] for table in SUITES[suite].tables(models)]
    return render(blocks)


def render_page(evaluation: Result) -> str:
    models = evaluation["models"]
    sections = [
        (
            suite.capitalize(),
            (SUITES[suite].__doc__ or "").splitlines()[0].partition(": ")[2],
            list(SUITES[suite].tables(models)),
            list(SUITES[suite].charts(models)),
        )
        for suite in models[0]["suites"]
    ]
    return page.render_page(
        "evaluation",
        "evaluation.html.j2",
        title="Evaluation of " + " and ".join(model["label"] for model in models),
        verdict=verdict(models),
        first=models[0]["label"],
        sections=sections,
        environment=evaluation["environment"],
        json=JSON,
    )
