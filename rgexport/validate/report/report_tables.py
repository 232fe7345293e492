"""The tables of what was measured, for a terminal and for a page."""

from collections.abc import Callable, Iterable, Iterator

from rgexport.tables import Row, Table
from rgexport.validate.equivalences import SAME
from rgexport.validate.measure import Comparison
from rgexport.validate.report.report_words import LABELS, number, percent
from rgexport.validate.result import Result
from rgexport.validate.states import worst


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
    "RMS logit error, of their spread": lambda c: number(c.logits.relative_rms),
    "mean |Δlogit|": lambda c: number(c.logits.mean),
    "mean cosine of logits": lambda c: f"{c.logits.cosine:.6f}",
    "KL mean (nats)": lambda c: f"{number(c.kl.mean)} ± {c.kl.standard_error:.1g}",
    "KL median": lambda c: number(c.kl.median),
    "KL 95th percentile": lambda c: number(c.kl.p95),
    "KL 99th percentile": lambda c: number(c.kl.p99),
    "KL max": lambda c: f"{number(c.kl.max)} at {c.kl.worst_position}",
    "top-1 agreement": lambda c: percent(c.agreement.top1),
    "top-5 agreement": lambda c: percent(c.agreement.top5),
    "top-1 flips": lambda c: f"{c.agreement.flips}",
    "… of them near ties": lambda c: f"{c.agreement.near_ties}",
    "largest margin that flipped": lambda c: number(c.agreement.largest_flip_margin),
    "greedy tokens in common": lambda c: f"{c.greedy_common} of {c.greedy_tokens}",
    "worst state": lambda c: number(worst(c.states)),
    "perplexity: reference": _likelihood("perplexity"),
    "perplexity: artifact": _likelihood("perplexity_candidate"),
    "bits per byte: reference": _likelihood("bits_per_byte"),
    "bits per byte: artifact": _likelihood("bits_per_byte_candidate"),
    "Δ nats per token": _delta,
}


def sides_of(r: Result) -> list[tuple[str, Comparison]]:
    """What it was compared with, by name."""
    sides = ("twin", r.twin), ("original", r.original)
    return [(name, side) for name, side in sides if side is not None]


def logits_table(r: Result) -> Table:
    """What was measured, of the twin and of the original."""
    return _table("Logits", "measured", r, _comparison_rows(r))


def drift_table(r: Result) -> Table:
    """The worst state after so many tokens, of each side."""
    return _table("Worst state by position", "after", r, _drift_rows(r))


def itself_table(r: Result) -> Table:
    """How far the artifact is from itself."""
    names = ("tokens", "logits", "states")
    return Table("Against itself", ("the same …", *names), list(_own_rows(r)), names)


def _table(title: str, first: str, r: Result, rows: Iterable[Row]) -> Table:
    names = [LABELS[name] for name, _ in sides_of(r)]
    return Table(title, (first, *names), list(rows), names)


def _comparison_rows(r: Result) -> Iterator[Row]:
    for name, show in _COMPARISON.items():
        cells = [show(side) for _, side in sides_of(r)]
        if any(cells):
            yield (name, *cells)


def _own_rows(r: Result) -> Iterator[Row]:
    for name, found in r.equivalences.items():
        state = number(worst(found.states)) if found.states else ""
        yield SAME[name], f"{found.tokens}", number(found.logits.relative_max), state


def _drift_rows(r: Result) -> Iterator[Row]:
    sides = [
        {found.position: found.states for found in side.drift} | {r.text.tokens: side.states}
        for _, side in sides_of(r)
    ]
    for position in sides[0]:
        cells = (number(worst(side[position])) if position in side else "" for side in sides)
        yield f"{position:,} tokens", *cells
