"""The outcome of `validate` as text and tables for a terminal: the verdict first."""

from collections.abc import Callable, Iterator

from rgexport import tables
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


def _parts(r: Result) -> Iterator[str | Table]:
    yield _headline(r)
    for check in r.checks:
        if not check.passed:
            line = f"FAILED  {check.name} is {_number(check.value)}, limit {_number(check.limit)}"
            yield f"{line} ({check.reason})"
    yield Table("Logits", ("", *_SIDES), _comparison_rows(r), _SIDES)
    yield Table("States", ("state", *_STATE), _state_rows(r.twin.states), _STATE)
    if r.reference is not None:
        yield from file_parts(r.reference)
    if r.weights is not None:
        header = ("tensor", "stored", *_WEIGHT)
        yield Table("Weights", header, _weight_rows(r.weights), _WEIGHT)
    yield _closing(r)


def _headline(r: Result) -> str:
    a, engine, text = r.artifact, r.engine, r.text
    exact = ", exact" if a.exact else ""
    cut = ", cut off" if text.truncated else ""
    failed = sum(not check.passed for check in r.checks)
    counts = f"{failed} of {len(r.checks)} checks failed" if failed else "every check passed"
    return (
        f"{'FAIL' if failed else 'PASS'}  {a.path}: {counts}\n\n"
        f"{a.name}, {a.precision} weights, {a.compute} activations{exact}; "
        f"{engine.engine} {engine.engine_version}, {engine.threads} threads\n"
        f"{text.tokens:,} tokens ({text.name}{cut}), {text.windows:.3g} windows long\n"
        f"twin: the reference with the artifact's own weights; original: {_source(r)}\n"
    )


def _source(r: Result) -> str:
    if not r.source.found and r.reference is not None:
        return f"{r.source.made_from}, as the reference file has it"
    if not r.source.found:
        return f"{r.source.made_from}, not given (-m), so the cost is not measured"
    other = "" if r.source.same_files else ", other files than the artifact was made from"
    return f"{r.source.path}{other}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
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
    "max |Δlogit|": lambda c: _number(c.logits.max),
    "… of the largest logit": lambda c: _number(c.logits.relative_max),
    "rms Δlogit of their spread": lambda c: _number(c.logits.relative_rms),
    "mean |Δlogit|": lambda c: _number(c.logits.mean),
    "KL mean (nats)": lambda c: f"{_number(c.kl.mean)} ± {c.kl.standard_error:.1g}",
    "KL median": lambda c: _number(c.kl.median),
    "KL 99th percentile": lambda c: _number(c.kl.p99),
    "KL max": lambda c: f"{_number(c.kl.max)} at {c.kl.worst_position}",
    "same first choice": lambda c: _percent(c.agreement.top1),
    "same first five": lambda c: _percent(c.agreement.top5),
    "largest lead that flipped": lambda c: _number(c.agreement.largest_flip_margin),
    "worst state": lambda c: _number(max((s.relative_max for s in c.states), default=0)),
    "perplexity: reference": _likelihood("perplexity"),
    "perplexity: artifact": _likelihood("perplexity_candidate"),
    "bits per byte: reference": _likelihood("bits_per_byte"),
    "bits per byte: artifact": _likelihood("bits_per_byte_candidate"),
    "Δ nats per token": _delta,
}


def _comparison_rows(r: Result) -> Iterator[Row]:
    for name, show in _COMPARISON.items():
        cells = (show(r.twin), "" if r.original is None else show(r.original))
        if any(cells):
            yield (name, *cells)
    yield "one by one against a chunk", _number(r.steps.logits.relative_max), ""


_SIDES = ("twin", "original")
_STATE = ("max |Δ| / max", "norm")
_WEIGHT = ("relative error", "projection", "max steps")


def _state_rows(errors: list[StateError]) -> Iterator[Row]:
    for e in sorted(errors, key=lambda e: -e.relative_max)[:WORST]:
        yield e.name, _number(e.relative_max), _number(e.relative_norm)
    if len(errors) > WORST:
        yield f"… and {len(errors) - WORST} better ones", "", ""


def _weight_rows(errors: list[WeightError]) -> Iterator[Row]:
    """The worst of each scheme, and one line for what was stored as it was."""
    for scheme in dict.fromkeys(e.scheme for e in errors):
        group = [e for e in errors if e.scheme == scheme]
        inexact = sorted((e for e in group if e.max_steps != 0), key=lambda e: -e.relative_error)
        for e in inexact[:WORST]:
            numbers = _number(e.relative_error), f"{e.projection:.5f}", _number(e.max_steps)
            yield (e.name, e.scheme, *numbers)
        if len(inexact) > WORST:
            yield f"… and {len(inexact) - WORST} better ones", scheme, "", "", ""
        if exact := len(group) - len(inexact):
            yield f"{exact} tensors, bit for bit", scheme, "0", "1", "0"


def _closing(r: Result) -> str:
    env = r.environment
    return f"{env['cpu']}, {env['cores']} cores, {env['system']}; Python {env['python']}"
