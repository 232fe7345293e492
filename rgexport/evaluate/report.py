"""What was found: tables for a terminal, an HTML page, and JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rgexport.evaluate.page import render_page
from rgexport.evaluate.pieces import Result
from rgexport.evaluate.tables import TABLES
from rgexport.files.targets import replace_file
from rgexport.tables import Table, render

JSON, PAGE = "evaluation.json", "evaluation.html"


def write_files(found: Result, folder: Path) -> Path:
    """Writes all figures and the page to the folder of the results; returns the page."""
    _write(folder / JSON, json.dumps(found, indent=1, allow_nan=False) + "\n")
    _write(folder / PAGE, render_page(found, JSON))
    return folder / PAGE


def _write(target: Path, text: str) -> None:
    with replace_file(target, force=True, replaceable=lambda path: True) as file:
        file.write_text(text, "utf-8")


def as_text(found: Result) -> str:
    """A table for each suite, or for each task of one."""
    return render(_tables(found["models"]))


def _tables(models: Sequence[Result]) -> Iterator[Table]:
    for suite in models[0]["suites"]:
        yield from TABLES[suite](models)
