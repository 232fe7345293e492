"""`rgexport validate`: opens, runs, compares, judges and reports."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rgexport.export.opening import open_artifact
from rgexport.printing import print_result
from rgexport.progress import expect_stages, note
from rgexport.validate.checks import parse_limits
from rgexport.validate.comparing import compare_all
from rgexport.validate.judging import judge
from rgexport.validate.opening import Opened, Request, open_all
from rgexport.validate.reference.reference_file import read_reference
from rgexport.validate.reference_pass import SharedPasses
from rgexport.validate.report.page import write_html
from rgexport.validate.report.terminal import render, render_several
from rgexport.validate.result import Result, require_writable, write_json
from rgexport.validate.rounding_cost import is_rounded
from rgexport.validate.running import asks_original, run_all, runs_natively

DEFAULTS = Request()


def validate_artifacts(
    artifacts: Sequence[Path],
    request: Request = DEFAULTS,
    *,
    reference: Path | None = None,
    json_file: Path | None = None,
    html_file: Path | None = None,
    limits: Sequence[str] = (),
    allow_ambiguous: bool = False,
) -> int:
    """Writes the report as JSON and HTML and prints it.

    Returns 0 if all artifacts pass and have the quality that was asked for, else 1.

    Args:
        artifacts: their paths; several are shown in one table.
        request: what to find out about each of them.
        reference: a reference file to compare with too.
        json_file: where the results go as JSON.
        html_file: where the page goes.
        limits: `NAME=VALUE`, instead of the limits in `thresholds`.
        allow_ambiguous: whether AMBIGUOUS passes.

    Raises:
        RequestError: see `validate_artifact`; or a file cannot be written.
    """
    for file in (json_file, html_file):
        if file is not None:
            require_writable(file)
    for path in artifacts[1:]:
        open_artifact(path)  # refuses a wrong one before the first one's work
    request = replace(
        request,
        limits=parse_limits(limits),
        reference=None if reference is None else read_reference(reference),
    )
    passes = SharedPasses()
    results = []
    for path in artifacts:
        if len(artifacts) > 1:
            note(f"{path}:")
        results.append(validate_artifact(path, request, passes))
    _report(results, json_file, html_file)
    enough = {"PASS", "AMBIGUOUS"} if allow_ambiguous else {"PASS"}
    return 0 if all(r.verdict in enough and r.good_enough for r in results) else 1


def validate_artifact(
    path: Path, request: Request = DEFAULTS, passes: SharedPasses | None = None
) -> Result:
    """Compares an artifact with its dequantized reference and, where it is found, its original.

    The references run first, one layer at a time. Then the artifact's session opens, and when it
    is closed, the ops are compared one by one.
    `passes` are those of originals that ran before, for other artifacts.

    Raises:
        RequestError: see `open_all` and `run_all`.
    """
    passes = passes or SharedPasses()
    opened = open_all(path, request)
    expect_stages(_stages(opened, passes))
    ran = run_all(opened, passes)
    result = compare_all(opened, ran)
    return judge(opened, ran, result)


def _stages(opened: Opened, passes: SharedPasses) -> int:
    """How many stages show their progress."""
    request, original = opened.request, opened.original
    # The dequantized reference, the artifact over the text, the ops one by one, and the graph.
    count = 4 + request.bench + runs_natively(opened)
    if original is not None:
        count += 2 + request.bisect + request.reproduce  # its pass, its weights, each layer
        count -= passes.has(original.checkpoint, opened.text.tokens)
    if original is not None or request.reference is not None:
        count += is_rounded(opened.manifest)
    return count + asks_original(opened) + (request.reference is not None)


def _report(results: list[Result], json_file: Path | None, html_file: Path | None) -> None:
    if json_file is not None:
        write_json(results, json_file)
    if html_file is not None:
        write_html(results, html_file)
    # Last: who reads it may leave after a few lines, as `head` does.
    one = len(results) == 1
    text = render(results[0], html_file) if one else render_several(results, html_file)
    print_result(text, end="")
