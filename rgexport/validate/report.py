"""The outcome of `validate` as text and tables for a terminal: the verdict first."""

from collections.abc import Callable, Iterator, Sequence

from rgexport import tables
from rgexport.progress import amount
from rgexport.tables import Row, Table
from rgexport.validate.file_report import file_parts
from rgexport.validate.measure import Comparison
from rgexport.validate.result import Result
from rgexport.validate.states import StateError
from rgexport.validate.weights import WeightError

WORST = 5
"""Rows of the tables of weights and states."""


def render(result: Result) -> str:
    """The whole report."""
    return tables.render(_parts(result))


def render_several(results: Sequence[Result]) -> str:
    """All artifacts in one table, and below it what failed."""
    return tables.render(_overview(results))


def _overview(results: Sequence[Result]) -> Iterator[str | Table]:
    failed = [result for result in results if not result.passed]
    counts = f"{len(failed)} of {len(results)} fail" if failed else f"all {len(results)} pass"
    yield f"{'FAIL' if failed else 'PASS'}  {counts}\n"
    yield Table("Artifacts", OVERVIEW, map(overview_row, results), OVERVIEW[1:-1])
    for result in failed:
        yield result.artifact.path
        yield from _failures(result)
    yield _closing(results[0])


OVERVIEW = ("artifact", "size", "bits", "KL to original", "Δperplexity", "top-1", "verdict")
"""Header of the table of several artifacts."""


def overview_row(r: Result) -> Row:
    """Bits are per weight; what only the original tells is empty without one."""
    c = r.original
    cost = ("", "", "")
    if c is not None:
        found = c.likelihood
        more = found.perplexity_candidate - found.perplexity if found else None
        cost = (
            f"{number(c.kl.mean)} ± {c.kl.standard_error:.1g}",
            "" if more is None else f"{more:+.3g}",
            percent(c.agreement.top1),
        )
    a = r.artifact
    return a.path, amount(a.bytes), f"{a.bits_per_weight:.2f}", *cost, r.verdict


def _failures(r: Result) -> Iterator[str]:
    for check in r.checks:
        if not check.passed:
            line = f"FAILED  {check.name} is {number(check.value)}, limit {number(check.limit)}"
            yield f"{line} ({check.reason})"


def _parts(r: Result) -> Iterator[str | Table]:
    yield _headline(r)
    yield from _failures(r)
    yield Table("Logits", ("", *SIDES), comparison_rows(r), SIDES)
    yield Table("States", ("state", *_STATE), _state_rows(r.twin.states), _STATE)
    if r.reference is not None:
        yield from file_parts(r.reference)
    if r.weights is not None:
        header = ("tensor", "stored", *_WEIGHT)
        yield Table("Weights", header, _weight_rows(r.weights), _WEIGHT)
    yield _closing(r)


def _headline(r: Result) -> str:
    a, engine, text = r.artifact, r.engine, r.text
    cut = ", cut off" if text.truncated else ""
    failed = sum(not check.passed for check in r.checks)
    counts = f"{failed} of {len(r.checks)} checks failed" if failed else "every check passed"
    return (
        f"{'FAIL' if failed else 'PASS'}  {a.path}: {counts}\n\n"
        f"{a.name}, {a.numbers}; "
        f"{engine.engine} {engine.engine_version}, {engine.threads} threads\n"
        f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long\n"
        f"twin: the reference with the artifact's own weights; original: {source_words(r)}\n"
    )


def source_words(r: Result) -> str:
    """Where the original is, and whether it is the one."""
    if not r.source.found and r.reference is not None:
        return f"{r.source.made_from}, as the reference file has it"
    if not r.source.found:
        return f"{r.source.made_from}, not given (-m), so the cost is not measured"
    other = "" if r.source.same_files else ", other files than the artifact was made from"
    return f"{r.source.path}{other}"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Of a share in [0, 1]."""
    return f"{100 * value:.2f} %"


def _likelihood(field: str) -> Callable[[Comparison], str]:
    def show(c: Comparison) -> str:
        value = None if c.likelihood is None else getattr(c.likelihood, field)
        return "" if value is None else f"{value:.4g}"

    return show


def _delta(c: Comparison) -> str:
    found = c.likelihood
    return "" if found is None else f"{found.delta:+.2g} ± {found.delta_standard_error:.1g}"


_COMPARISON: dict[str, Callable[[Comparison], str]] = {
    "max |Δlogit|": lambda c: number(c.logits.max),
    "… of the largest logit": lambda c: number(c.logits.relative_max),
    "rms Δlogit of their spread": lambda c: number(c.logits.relative_rms),
    "mean |Δlogit|": lambda c: number(c.logits.mean),
    "mean cosine of logits": lambda c: f"{c.logits.cosine:.6f}",
    "KL mean (nats)": lambda c: f"{number(c.kl.mean)} ± {c.kl.standard_error:.1g}",
    "KL median": lambda c: number(c.kl.median),
    "KL 95th percentile": lambda c: number(c.kl.p95),
    "KL 99th percentile": lambda c: number(c.kl.p99),
    "KL max": lambda c: f"{number(c.kl.max)} at {c.kl.worst_position}",
    "same first choice": lambda c: percent(c.agreement.top1),
    "same first five": lambda c: percent(c.agreement.top5),
    "other first choices": lambda c: f"{c.agreement.flips}",
    "… of them near ties": lambda c: f"{c.agreement.near_ties}",
    "largest lead that flipped": lambda c: number(c.agreement.largest_flip_margin),
    "worst state": lambda c: number(max((s.relative_max for s in c.states), default=0)),
    "perplexity: reference": _likelihood("perplexity"),
    "perplexity: artifact": _likelihood("perplexity_candidate"),
    "bits per byte: reference": _likelihood("bits_per_byte"),
    "bits per byte: artifact": _likelihood("bits_per_byte_candidate"),
    "Δ nats per token": _delta,
}


def comparison_rows(r: Result) -> Iterator[Row]:
    """What was measured, of the twin and of the original."""
    for name, show in _COMPARISON.items():
        cells = (show(r.twin), "" if r.original is None else show(r.original))
        if any(cells):
            yield (name, *cells)
    yield "one by one against a chunk", number(r.steps.logits.relative_max), ""


SIDES = ("twin", "original")
_STATE = ("max |Δ| / max", "norm")
_WEIGHT = ("relative error", "projection", "max steps")


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
            numbers = number(e.relative_error), f"{e.projection:.5f}", number(e.max_steps)
            yield (e.name, e.scheme, *numbers)
        if len(inexact) > WORST:
            yield f"… and {len(inexact) - WORST} better ones", scheme, "", "", ""
        if exact := len(group) - len(inexact):
            yield f"{exact} tensors, bit for bit", scheme, "0", "1", "0"


def _closing(r: Result) -> str:
    env = r.environment
    return f"{env['cpu']}, {env['cores']} cores, {env['system']}; Python {env['python']}"
