"""The outcome of `validate` for a terminal: verdict, cost and what failed; with `-v`, all of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rgexport import progress, tables
from rgexport.export.request import as_argument
from rgexport.progress import amount
from rgexport.tables import Row, Table
from rgexport.validate.report.file_report import file_parts, first_layer, reference_warnings
from rgexport.validate.report.overview import counted_verdicts, overview, verdict_of
from rgexport.validate.report.report_tables import (
    drift_table,
    itself_table,
    logits_table,
    sides_of,
)
from rgexport.validate.report.report_words import (
    MOST_NAMED,
    check_words,
    counted_checks,
    not_passed,
    number,
    source_words,
    speed_words,
    twin_words,
)
from rgexport.validate.report.site_tables import bisect_parts
from rgexport.validate.report.summary_table import summary_table
from rgexport.validate.result import Result
from rgexport.validate.states import StateError
from rgexport.validate.weights.weight_errors import WeightError

WORST = 5
"""Rows of the tables of weights and states."""
MOST_SUSPECTS = 3
"""Of each artifact where there are several."""


def render(result: Result, page: Path | None = None) -> str:
    """The report; `page` is where it was written as HTML."""
    return tables.render((_everything if progress.verbose else _summary)(result, page))


def render_several(results: Sequence[Result], page: Path | None = None) -> str:
    """All artifacts in one table, and below it what failed."""
    return tables.render(_overview(results, page))


def _overview(results: Sequence[Result], page: Path | None) -> Iterator[str | Table]:
    yield f"{verdict_of(results)}  {counted_verdicts(results)}\n"
    yield overview(results)
    for result in results:
        if result.verdict != "PASS":
            yield result.artifact.path
            yield from _failures(result)
            yield from _first_suspects(result)
    yield _environment(results[0]) if progress.verbose else _next_step(results, page)


def _first_suspects(r: Result) -> Iterator[str]:
    for suspect in (r.suspects or [])[:MOST_SUSPECTS]:
        yield f"SUSPECT  {suspect.site}: {suspect.evidence}"


_WORDS = {"FAIL": "FAILED", "AMBIGUOUS": "AMBIGUOUS"}


def _failures(r: Result) -> Iterator[str]:
    """Of each check that did not pass, one line; the failed ones first."""
    found = not_passed(r)
    for check in found[:MOST_NAMED]:
        yield f"{_WORDS[check.outcome]}  {check.name} is {check_words(check)} ({check.reason})"
    if more := found[MOST_NAMED:]:
        yield f"… and {len(more)} more"


def _summary(r: Result, page: Path | None) -> Iterator[str | Table]:
    """What fits a screen; and what was asked for by `--bisect`."""
    yield _headline(r)
    yield from _failures(r)
    yield from _facts(r)
    if r.reference is not None:
        yield from reference_warnings(r.reference)
    if r.twin or r.original or r.reference:
        yield summary_table(r)
    if r.twin is not None:
        yield _MEANING
    if r.layers is not None or r.suspects:
        yield ""
        yield from bisect_parts(None, r.layers, r.suspects or ())
    if r.reference is not None:
        yield from first_layer(r.reference)
    yield _next_step([r], page)


_MEANING = (
    "The dequantized reference has the artifact's own weights: the distance to it is the export's, "
    "that to the original is what compression cost."
)


def _everything(r: Result, page: Path | None) -> Iterator[str | Table]:
    yield _headline(r)
    yield from _failures(r)
    yield from _facts(r)
    yield ""
    if sides_of(r):
        yield logits_table(r)
    yield itself_table(r)
    if r.twin is not None:
        yield Table("States", ("state", *_STATE), _state_rows(r.twin.states), _STATE)
    if any(side.drift for _, side in sides_of(r)):
        yield drift_table(r)
    yield from bisect_parts(r.sites, r.layers, r.suspects or ())
    if r.reference is not None:
        yield from file_parts(r.reference)
    if r.weights is not None:
        header = ("tensor", "stored", *_WEIGHT)
        yield Table("Weights", header, _weight_rows(r.weights), _WEIGHT)
    yield _environment(r)


def _headline(r: Result) -> str:
    return f"{r.verdict}  {r.artifact.path}: {counted_checks(r)}"


def _facts(r: Result) -> Iterator[str]:
    """What was compared, on what and with what."""
    a, engine, text = r.artifact, r.engine, r.text
    cut = ", cut off" if text.truncated else ""
    yield ""
    yield f"{a.name}, {a.numbers}; {amount(a.bytes)}, {a.bits_per_weight:.2f} bits per weight"
    speed = f"; {speed_words(r.speed)}" if r.speed else ""
    yield f"{engine.title}, {engine.threads} threads{speed}"
    yield f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long"
    yield f"original: {source_words(r)}"
    if r.twin is None:
        yield f"dequantized reference: {twin_words(r)}"


def _next_step(results: Sequence[Result], page: Path | None) -> str:
    """What tells more."""
    failed = next((r for r in results if r.verdict != "PASS"), None)
    if failed is not None and failed.suspects is None and failed.twin is not None:
        artifact = as_argument(Path(failed.artifact.path))
        return f"To find where it goes wrong: rgexport validate {artifact} --bisect"
    if page is not None:
        return f"All numbers as a page: {page}"
    return "All numbers: -v, or --html FILE for a page."


_STATE = ("max |Δ| / max", "norm")
_WEIGHT = ("error", "projection", "noise", "max steps")


def _state_rows(errors: list[StateError]) -> Iterator[Row]:
    for e in sorted(errors, key=lambda e: -e.relative_max)[:WORST]:
        yield e.name, number(e.relative_max), number(e.relative_norm)
    if len(errors) > WORST:
        yield f"… and {len(errors) - WORST} better ones", "", ""


def _weight_rows(errors: list[WeightError]) -> Iterator[Row]:
    """The worst of each scheme, and one line for what was stored as it was."""
    for scheme in dict.fromkeys(e.scheme for e in errors):
        group = [e for e in errors if e.scheme == scheme]
        inexact = sorted((e for e in group if e.max_steps != 0), key=lambda e: -e.relative_error)
        for e in inexact[:WORST]:
            numbers = number(e.relative_error), f"{e.projection:.5f}", number(e.noise)
            yield (e.name, e.scheme, *numbers, number(e.max_steps))
        if len(inexact) > WORST:
            yield f"… and {len(inexact) - WORST} better ones", scheme, "", "", "", ""
        if exact := len(group) - len(inexact):
            yield f"{exact} tensors, bit for bit", scheme, "0", "1", "0", "0"


def _environment(r: Result) -> str:
    env = r.environment
    return f"{env['cpu']}, {env['cores']} cores, {env['system']}; Python {env['python']}"
