"""The outcome of `validate` as text and tables for a terminal: the verdict first."""

from collections.abc import Iterator, Sequence

from rgexport import tables
from rgexport.tables import Row, Table
from rgexport.validate.report.file_report import file_parts
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
from rgexport.validate.result import Result
from rgexport.validate.states import StateError
from rgexport.validate.weights.weight_errors import WeightError

WORST = 5
"""Rows of the tables of weights and states."""
MOST_SUSPECTS = 3
"""Of each artifact where there are several."""


def render(result: Result) -> str:
    """The whole report."""
    return tables.render(_parts(result))


def render_several(results: Sequence[Result]) -> str:
    """All artifacts in one table, and below it what failed."""
    return tables.render(_overview(results))


def _overview(results: Sequence[Result]) -> Iterator[str | Table]:
    yield f"{verdict_of(results)}  {counted_verdicts(results)}\n"
    yield overview(results)
    for result in results:
        if result.verdict != "PASS":
            yield result.artifact.path
            yield from _failures(result)
            yield from _first_suspects(result)
    yield _closing(results[0])


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


def _parts(r: Result) -> Iterator[str | Table]:
    yield _headline(r)
    yield from _failures(r)
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
    yield _closing(r)


def _headline(r: Result) -> str:
    a, engine, text = r.artifact, r.engine, r.text
    cut = ", cut off" if text.truncated else ""
    speed = f"; {speed_words(r.speed)}" if r.speed else ""
    return (
        f"{r.verdict}  {a.path}: {counted_checks(r)}\n\n"
        f"{a.name}, {a.numbers}; "
        f"{engine.title}, {engine.threads} threads{speed}\n"
        f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long\n"
        f"twin: {twin_words(r)}; original: {source_words(r)}\n"
    )


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


def _closing(r: Result) -> str:
    env = r.environment
    return f"{env['cpu']}, {env['cores']} cores, {env['system']}; Python {env['python']}"
