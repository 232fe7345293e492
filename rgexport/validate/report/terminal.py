"""The outcome of `validate` for a terminal: verdict, cost and what failed; with `-v`, all of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rgexport import progress, tables
from rgexport.export.advice import as_argument
from rgexport.tables import Table
from rgexport.units import amount
from rgexport.validate.continuations import Continuation
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report.result_tables import (
    DRIFT,
    PROMPT,
    bisect_tables,
    drift_table,
    file_table,
    itself_table,
    logits_table,
    overview,
    prompt_cells,
    sides_of,
    sketch_table,
    state_table,
    summary_table,
    weight_table,
)
from rgexport.validate.report.words import (
    MOST_NAMED,
    answers_of,
    bits_words,
    check_words,
    counted_checks,
    counted_verdicts,
    doubt_words,
    not_passed,
    number,
    part_words,
    quality_words,
    shortfall_words,
    source_words,
    speed_words,
    structure_words,
    verdict_words,
)
from rgexport.validate.result import Result
from rgexport.validate.states import worst

MOST_PROMPT = 60
"""Characters of a prompt: its last ones."""
MOST_SUSPECTS = 3
"""Of each artifact where there are several."""
_WORDS = {"FAIL": "FAILED", "AMBIGUOUS": "AMBIGUOUS"}


def render(result: Result, page: Path | None = None) -> str:
    """The report; `page` is where it was written as HTML."""
    return tables.render((_everything if progress.verbose else _summary)(result, page))


def render_several(results: Sequence[Result], page: Path | None = None) -> str:
    """All artifacts in one table, followed by what failed."""
    return tables.render(_overview(results, page))


def _overview(results: Sequence[Result], page: Path | None) -> Iterator[str | Table]:
    yield f"{verdict_words(*results)}  {counted_verdicts(results)}\n"
    yield overview(results)
    for result in results:
        if short := shortfall_words(result):
            yield f"{result.artifact.path}: {short}"
        if result.verdict_scope == "text":
            yield f"{result.artifact.path}: graph: {structure_words(result)}"
        if result.verdict != "PASS":
            yield result.artifact.path
            yield from _failures(result)
            for suspect in (result.suspects or [])[:MOST_SUSPECTS]:
                yield f"SUSPECT  {suspect.site}: {suspect.evidence}"
    yield _environment(results[0]) if progress.verbose else _next_step(results, page)


def _summary(r: Result, page: Path | None) -> Iterator[str | Table]:
    """What fits a screen, and what was asked for by `--bisect`."""
    yield from _head(r)
    if r.reference is not None:
        yield from _warnings(r.reference)
    yield summary_table(r)
    yield from _answers(sorted(r.continuations or [], key=lambda one: one.common)[:1])
    if r.layers is not None or r.suspects:
        yield ""
        yield from bisect_tables(None, r.layers, r.suspects or ())
    yield _next_step([r], page)


def _everything(r: Result, page: Path | None) -> Iterator[str | Table]:
    yield from _head(r)
    yield ""
    yield logits_table(r)
    yield itself_table(r)
    yield state_table(r.dequantized.states)
    if any(side.drift for _, side in sides_of(r)):
        yield drift_table(r)
    yield from bisect_tables(r.sites, r.layers, r.suspects or ())
    if r.reference is not None:
        yield from _file_parts(r.reference)
    yield from _answers(r.continuations or [])
    if r.weights is not None:
        yield weight_table(r.weights)
    yield _environment(r)


def _head(r: Result) -> Iterator[str]:
    """The verdict, what failed, and what was compared with what."""
    a, engine, text = r.artifact, r.engine, r.text
    yield f"{verdict_words(r)}  {a.path}: {counted_checks(r)}"
    yield from _quality(r)
    yield from _failures(r)
    cut = ", cut off" if text.truncated else ""
    speed = f"; {speed_words(r)}" if r.speed else ""
    yield ""
    yield f"{a.name}, {a.numbers}; {amount(a.bytes)}, {bits_words(r)}"
    tokens = f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long"
    yield f"{engine.title}, {engine.threads} threads{speed}; {tokens}"
    if progress.verbose or not r.source.same_files:
        yield f"original: {source_words(r)}"
    yield from (f"{part}: {sentence}" for part, sentence in part_words(r).items())


def _quality(r: Result) -> Iterator[str]:
    """The second verdict; nothing where there was no original to compare with."""
    if (q := r.quality) is not None:
        yield f"{q.grade.upper()}  quality{doubt_words(q)}: {quality_words(q)}"
        yield f"{q.meaning} {shortfall_words(r)}".rstrip()


def _answers(found: Sequence[Continuation]) -> Iterator[str]:
    """What both models write after a prompt; the first token that differs is in brackets."""
    for one in found:
        yield f"After “{_end_of(one.prompt)}”, {one.common} of {one.tokens} tokens are the same:"
        for side, answer in zip(("original", "artifact"), answers_of(one), strict=True):
            differing = f"[{answer.differing}]" if answer.differing else ""
            yield f"  {side}  {_one_line(answer.shared + differing + answer.rest)}"


def _end_of(prompt: str) -> str:
    text = _one_line(prompt)
    return text if len(text) <= MOST_PROMPT else f"…{text[-MOST_PROMPT:]}"


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")


def _failures(r: Result) -> Iterator[str]:
    """A line for each check that did not pass, the failed ones first."""
    found = not_passed(r)
    for check in found[:MOST_NAMED]:
        yield f"{_WORDS[check.outcome]}  {check.name} is {check_words(check)} ({check.reason})"
    if more := found[MOST_NAMED:]:
        yield f"… and {len(more)} more"


def _file_parts(found: AgainstFile) -> Iterator[str | Table]:
    computed = ", ".join(f"{key} {value}" for key, value in found.computed.items())
    yield f"reference file: {found.path}, {found.model} ({computed})"
    yield from _warnings(found)
    yield ""
    yield file_table(found)
    rows = ((prompt.name, *prompt_cells(prompt)) for prompt in found.prompts)
    yield Table("Prompts", ("prompt", *PROMPT), rows, PROMPT)
    if found.drift:
        drifted = [(f"{d.position:,} tokens", number(worst(d.states))) for d in found.drift]
        yield Table(DRIFT, ("after", "worst"), drifted, ("worst",))
    yield sketch_table(found)


def _warnings(found: AgainstFile) -> Iterator[str]:
    """Why the reference file may be of another model."""
    if not found.same_files:
        yield "the reference file is of other weight files than the artifact was made from"


def _next_step(results: Sequence[Result], page: Path | None) -> str:
    failed = next((r for r in results if r.verdict != "PASS"), None)
    if failed is not None and failed.suspects is None:
        artifact = as_argument(Path(failed.artifact.path))
        return f"To find where it goes wrong: rgexport validate {artifact} --bisect"
    if page is not None:
        return f"All numbers as a page: {page}"
    return "All numbers: -v, or --html FILE for a page."


def _environment(r: Result) -> str:
    env = r.environment
    return f"{env['cpu']}, {env['cores']} cores, {env['system']}; Python {env['python']}"
