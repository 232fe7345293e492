"""The outcome of `validate` for a terminal: verdict, cost and what failed; with `-v`, all of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rgexport import progress
from rgexport.artifacts.opening import as_argument
from rgexport.reporting.numbers import number, percent
from rgexport.reporting.tables import Table
from rgexport.reporting.tables import render as render_blocks
from rgexport.units import amount
from rgexport.validate.continuations import Continuation
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report import sentences, tables
from rgexport.validate.report.sentences import MOST_NAMED, check_text
from rgexport.validate.result import ValidationResult

_OUTCOMES = {"FAIL": "FAILED", "AMBIGUOUS": "AMBIGUOUS"}
Blocks = Iterator[str | Table]


def render(results: Sequence[ValidationResult]) -> str:
    if len(results) > 1:
        return render_blocks(_overview(results))
    return render_blocks((_everything if progress.verbose else _summary)(results[0]))


def _overview(results: Sequence[ValidationResult]) -> Blocks:
    yield f"{sentences.verdict_text(*results)}  {sentences.counted_verdicts(results)}\n"
    yield tables.overview(results)
    yield from filter(None, (sentences.closest_text(results), sentences.UNITS))
    for result in results:
        path = result.artifact.path
        if short := sentences.shortfall_text(result):
            yield f"{path}: {short}"
        if result.verdict_scope == "text":
            yield f"{path}: graph: {sentences.structure_text(result)}"
        if result.verdict != "PASS":
            yield path
            yield from _failures(result)
            for suspect in (result.suspects or [])[:3]:
                yield f"SUSPECT  {suspect.site}: {suspect.evidence}"
    if not progress.verbose:
        yield _next_step(results)
        return
    for result in results:
        yield ""
        yield from _everything(result)


def _summary(r: ValidationResult) -> Blocks:
    yield from _head(r)
    yield tables.summary_table(r)
    yield from _answers(sorted(r.continuations or [], key=lambda text: text.common)[:1])
    if r.layers or r.suspects:
        yield ""
        yield from tables.bisect_tables(r)
    yield _next_step([r])


def _everything(r: ValidationResult) -> Blocks:
    yield from _head(r)
    yield ""
    yield tables.logits_table(r)
    yield tables.itself_table(r)
    yield tables.drift_table(r)
    if r.sites is not None:
        yield tables.op_bars(r.sites)
    yield from tables.bisect_tables(r)
    if r.reference is not None:
        yield from _reference_file(r.reference)
    yield from _answers(r.continuations or [])
    if r.weights is not None:
        yield tables.weight_table(r.weights)


def _head(r: ValidationResult) -> Iterator[str]:
    a, engine, text = r.artifact, r.engine, r.text
    yield f"{sentences.verdict_text(r)}  {a.path}: {sentences.counted_checks(r)}"
    if (q := r.quality) is not None:
        figures = f"the same first choice at {percent(q.top1)} of the tokens, KL {number(q.kl)}"
        source = ", by the reference file" if q.against == "reference" else ""
        yield f"{q.grade.upper()}  quality{sentences.doubt_text(q)}: {figures}{source}"
        yield f"{q.meaning} {sentences.shortfall_text(r)}".rstrip()
    yield from _failures(r)
    cut = ", cut off" if text.truncated else ""
    yield ""
    yield f"{a.name}, {a.numbers}; {amount(a.bytes)}, {sentences.bits_text(r)}"
    tokens = f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long"
    yield f"{engine.title}, {engine.threads} threads; {tokens}"
    if progress.verbose or not r.source.same_files:
        yield f"original: {sentences.source_text(r)}"
    if r.reference is not None and not r.reference.same_files:
        yield "the reference file is of other weight files than the artifact was made from"
    yield from (f"{name}: {sentence}" for name, sentence in sentences.proof_sentences(r).items())


def _answers(continuations: Sequence[Continuation]) -> Iterator[str]:
    for text in continuations:
        prompt = _one_line(text.prompt)
        end = prompt if len(prompt) <= 60 else f"…{prompt[-60:]}"
        yield f"After “{end}”, {text.common} of {text.tokens} tokens are the same:"
        for side, answer in zip(("original", "artifact"), sentences.answers_of(text), strict=True):
            differing = f"[{answer.differing}]" if answer.differing else ""
            yield f"  {side}  {_one_line(answer.shared + differing + answer.rest)}"


def _one_line(text: str) -> str:
    return text.replace("\n", "↵")


def _failures(r: ValidationResult) -> Iterator[str]:
    checks = sentences.not_passed(r)
    for check in checks[:MOST_NAMED]:
        yield f"{_OUTCOMES[check.outcome]}  {check.name} is {check_text(check)} ({check.reason})"
    if unnamed := checks[MOST_NAMED:]:
        yield f"… and {len(unnamed)} more"


def _reference_file(file: AgainstFile) -> Blocks:
    computed = ", ".join(f"{key} {value}" for key, value in file.computed.items())
    yield f"reference file: {file.path}, {file.model} ({computed})"
    yield ""
    yield tables.file_table(file)
    yield tables.prompt_bars(file)
    if file.drift:
        yield tables.file_drift_table(file)
    yield tables.sketch_table(file)


def _next_step(results: Sequence[ValidationResult]) -> str:
    failed = next((r for r in results if r.verdict != "PASS"), None)
    if failed is not None and failed.suspects is None:
        artifact = as_argument(Path(failed.artifact.path))
        return f"To find where it goes wrong: rgexport validate {artifact} --bisect"
    return "All numbers: -v, or --html FILE for a page."
