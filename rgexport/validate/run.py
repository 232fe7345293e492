"""`rgexport validate`: compares artifacts, writes the reports and tells the verdict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgexport.export.opening import open_artifact
from rgexport.validate.checks import parse_limits
from rgexport.validate.parity import compare
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.report.page import write_html
from rgexport.validate.report.terminal import render, render_several
from rgexport.validate.result import require_writable, write_json
from rgexport.validate.teacher import SharedPasses


def validate_artifacts(
    artifacts: Sequence[Path],
    *,
    reference: Path | None = None,
    json_file: Path | None = None,
    html_file: Path | None = None,
    limits: Sequence[str] = (),
    allow_ambiguous: bool = False,
    **options: Any,
) -> int:
    """Writes the report as JSON and HTML and prints it; returns 0 if all artifacts pass, else 1.

    Args:
        artifacts: their paths; of several, one table is printed.
        reference: a reference file to compare with too; only with that where there is no torch.
        json_file: where the results go as JSON.
        html_file: where the page goes.
        limits: `NAME=VALUE`, instead of the limits in `thresholds`.
        allow_ambiguous: whether what can be neither affirmed nor denied will do.
        options: see `compare`.

    Raises:
        RequestError: see `compare`; or a file cannot be written.
    """
    for file in (json_file, html_file):
        if file is not None:
            require_writable(file)
    for path in artifacts[1:]:
        open_artifact(path)  # what is wrong with a later one is told before the first one's work
    options["limits"] = parse_limits(limits)
    options["reference"] = None if reference is None else read_reference(reference)
    passes = SharedPasses()
    results = [compare(path, passes=passes, **options) for path in artifacts]
    if json_file is not None:
        write_json(results, json_file)
    if html_file is not None:
        write_html(results, html_file)
    # Last: who reads it may leave after a few lines, as `head` does.
    one = len(results) == 1
    text = render(results[0], html_file) if one else render_several(results, html_file)
    print(text, end="")
    enough = {"PASS", "AMBIGUOUS"} if allow_ambiguous else {"PASS"}
    return 0 if all(result.verdict in enough for result in results) else 1
