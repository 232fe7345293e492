"""The outcome of `validate` for a terminal: verdict, cost and what failed; with `-v`, all of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rgexport import progress
from rgexport.export.advice import as_argument
from rgexport.reporting import tables
from rgexport.reporting.numbers import number, percent
from rgexport.reporting.tables import Table
from rgexport.units import amount
from rgexport.validate.continuations import Continuation
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report.sentences import (
    LABELS,
    MOST_NAMED,
    answers_of,
    bits_text,
    check_text,
    counted_checks,
    counted_verdicts,
    doubt_text,
    not_passed,
    proof_sentences,
    quality_meaning,
    shortfall_text,
    source_text,
    speed_text,
    structure_text,
    verdict_text,
)
from rgexport.validate.report.tables import (
    DRIFT,
    bisect_tables,
    drift_of,
    drift_table,
    file_table,
    itself_table,
    logits_table,
    overview,
    prompt_bars,
    sides_of,
    sketch_table,
    state_table,
    summary_table,
    weight_table,
)
from rgexport.validate.result import Result

MOST_PROMPT = 60
"""Characters of a prompt: its last ones."""
MOST_SUSPECTS = 3
"""Suspects of each of several artifacts."""
_OUTCOMES = {"FAIL": "FAILED", "AMBIGUOUS": "AMBIGUOUS"}
Blocks = Iterator[str | Table]


def render(result: Result, page: Path | None = None) -> str:
    """Returns the report; `page` is the path of its HTML page, if it was written."""
    return tables.render((_everything if progress.verbose else _summary)(result, page))


def render_several(results: Sequence[Result], page: Path | None = None) -> str:
    """Returns all artifacts in one table, followed by the failures."""
    return tables.render(_overview(results, page))


def _overview(results: Sequence[Result], page: Path | None) -> Blocks:
    yield f"{verdict_text(*results)}  {counted_verdicts(results)}\n"
    yield overview(results)
    for result in results:
        path = result.artifact.path
        if short := shortfall_text(result):
            yield f"{path}: {short}"
        if result.verdict_scope == "text":
            yield f"{path}: graph: {structure_text(result)}"
        if result.verdict != "PASS":
            yield path
            yield from _failures(result)
            for suspect in (result.suspects or [])[:MOST_SUSPECTS]:
                yield f"SUSPECT  {suspect.site}: {suspect.evidence}"
    yield _environment(results[0]) if progress.verbose else _next_step(results, page)


def _summary(r: Result, page: Path | None) -> Blocks:
    """Yields what fits a screen, and the tables of `--bisect`."""
    yield from _head(r)
    if r.reference is not None:
        yield from _warnings(r.reference)
    yield summary_table(r)
    yield from _answers(sorted(r.continuations or [], key=lambda text: text.common)[:1])
    if r.layers is not None or r.suspects:
        yield ""
        yield from bisect_tables(None, r.layers, r.suspects or ())
    yield _next_step([r], page)


def _everything(r: Result, page: Path | None) -> Blocks:
    sides = sides_of(r)
    yield from _head(r)
    yield ""
    yield logits_table(r)
    yield itself_table(r)
    yield state_table(r.dequantized.states)
    if any(side.drift for _, side in sides):
        drift = {LABELS[name]: drift_of(r, side) for name, side in sides}
        yield drift_table("Worst state by position", drift)
    yield from bisect_tables(r.sites, r.layers, r.suspects or ())
    if r.reference is not None:
        yield from _reference_file(r.reference)
    yield from _answers(r.continuations or [])
    if r.weights is not None:
        yield weight_table(r.weights)
    yield _environment(r)


def _head(r: Result) -> Iterator[str]:
    """Yields the verdict, the failures, and lines on the compared models and the text."""
    a, engine, text = r.artifact, r.engine, r.text
    yield f"{verdict_text(r)}  {a.path}: {counted_checks(r)}"
    if (q := r.quality) is not None:
        figures = f"the same first choice at {percent(q.top1)} of the tokens, KL {number(q.kl)}"
        source = ", by the reference file" if q.against == "reference" else ""
        yield f"{q.grade.upper()}  quality{doubt_text(q)}: {figures}{source}"
        yield quality_meaning(r, q)
    yield from _failures(r)
    cut = ", cut off" if text.truncated else ""
    speed = f"; {speed_text(r)}" if r.speed else ""
    yield ""
    yield f"{a.name}, {a.numbers}; {amount(a.bytes)}, {bits_text(r)}"
    tokens = f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long"
    yield f"{engine.title}, {engine.threads} threads{speed}; {tokens}"
    if progress.verbose or not r.source.same_files:
        yield f"original: {source_text(r)}"
    yield from (f"{name}: {sentence}" for name, sentence in proof_sentences(r).items())


def _answers(continuations: Sequence[Continuation]) -> Iterator[str]:
    """Yields both models' texts after a prompt; the first token that differs is in brackets."""
    for text in continuations:
        prompt = _one_line(text.prompt)
        end = prompt if len(prompt) <= MOST_PROMPT else f"…{prompt[-MOST_PROMPT:]}"
        yield f"After “{end}”, {text.common} of {text.tokens} tokens are the same:"
        for side, answer in zip(("original", "artifact"), answers_of(text), strict=True):
            differing = f"[{answer.differing}]" if answer.differing else ""
            yield f"  {side}  {_one_line(answer.shared + differing + answer.rest)}"


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")


def _failures(r: Result) -> Iterator[str]:
    checks = not_passed(r)
    for check in checks[:MOST_NAMED]:
        yield f"{_OUTCOMES[check.outcome]}  {check.name} is {check_text(check)} ({check.reason})"
    if unnamed := checks[MOST_NAMED:]:
        yield f"… and {len(unnamed)} more"


def _reference_file(file: AgainstFile) -> Blocks:
    computed = ", ".join(f"{key} {value}" for key, value in file.computed.items())
    yield f"reference file: {file.path}, {file.model} ({computed})"
    yield from _warnings(file)
    yield ""
    yield file_table(file)
    prompts = prompt_bars(file)
    yield Table("Prompts", prompts.header, prompts.rows, prompts.numbers)
    if file.drift:
        yield drift_table(DRIFT, {"worst": file.drift})
    yield sketch_table(file)


def _warnings(file: AgainstFile) -> Iterator[str]:
    if not file.same_files:
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
