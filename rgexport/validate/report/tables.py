"""The tables of a result, for the terminal and the page."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from rgexport.reporting.numbers import number, percent, plus_minus, rate
from rgexport.reporting.tables import Row, Table
from rgexport.units import amount
from rgexport.validate.bisect.site_errors import SiteError
from rgexport.validate.bisect.sites import SiteReport
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.costs import LayerCost
from rgexport.validate.equivalences import SAME
from rgexport.validate.identity.items import IdentityItem
from rgexport.validate.measure import Comparison
from rgexport.validate.metrics import Likelihood
from rgexport.validate.reference.against import AgainstFile, PromptResult
from rgexport.validate.report.sentences import LABELS, mean_kl
from rgexport.validate.result import Result
from rgexport.validate.states import StateError, worst
from rgexport.validate.weights.tensor_errors import SketchError, WeightError

WORST = 5
"""Rows of tables that show only the worst."""
MOST = 30
"""Ops beyond their limits, and suspects, that are shown."""
PROMPT = ("tokens", "positions", "KL mean", "top-1", "worst state", "greedy")
"""Columns of `prompt_cells`."""
DRIFT = "Recurrent states inside the longest prompt"
_TENSOR = ("error", "projection", "noise")
_EXACT = 0.05
"""Noise below this is the sketch's own rounding."""

Compared = Comparison | AgainstFile
E = TypeVar("E", bound=SketchError | WeightError)


def sides_of(r: Result) -> list[tuple[str, Comparison]]:
    """Returns the comparisons with models, and the names of their fields."""
    return [("twin", r.dequantized)] + ([] if r.original is None else [("original", r.original)])


def cost_of(r: Result) -> Compared | None:
    """Returns the comparison that measures the cost: with the original, or a reference file."""
    return r.original or r.reference


def _table(title: str, names: Row, numbers: Row, rows: Iterable[Row]) -> Table:
    return Table(title, (*names, *numbers), list(rows), numbers)


def _first(
    rows: Sequence[Row], most: int = WORST, ending: str = "with smaller errors"
) -> Iterator[Row]:
    yield from rows[:most]
    if len(rows) > most:
        yield f"… and {len(rows) - most} {ending}", *[""] * (len(rows[0]) - 1)


def _of_likelihood(show: Callable[[Likelihood], str]) -> Callable[[Compared], str]:
    return lambda c: "" if c.likelihood is None else show(c.likelihood)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


_SUMMARY: dict[str, Callable[[Compared], str]] = {
    "KL, nats per token": lambda c: mean_kl(c.kl),
    "top-1 agreement": lambda c: percent(c.agreement.top1),
    "RMS logit error": lambda c: number(c.logits.relative_rms),
    "worst state error at end": lambda c: number(worst(c.states)),
    "perplexity": _of_likelihood(lambda p: f"{p.perplexity:.4g} → {p.perplexity_candidate:.4g}"),
}


def summary_table(r: Result) -> Table:
    """Returns the most important numbers, a column for each comparison; the cost comes first."""
    sides = {
        LABELS["original"]: r.original,
        "reference file": r.reference,
        LABELS["twin"]: r.dequantized,
    }
    present = {name: side for name, side in sides.items() if side is not None}
    return _table("", ("compared with",), tuple(present), _rows(_SUMMARY, present.values()))


_MEASURED: dict[str, Callable[[Compared], str]] = {
    "max |Δlogit|": lambda c: number(c.logits.max),
    "… of the largest logit": lambda c: number(c.logits.relative_max),
    "RMS logit error, of their spread": lambda c: number(c.logits.relative_rms),
    "mean |Δlogit|": lambda c: number(c.logits.mean),
    "mean cosine of logits": lambda c: f"{c.logits.cosine:.6f}",
    "KL mean (nats)": lambda c: mean_kl(c.kl),
    "KL median": lambda c: number(c.kl.median),
    "KL 95th percentile": lambda c: number(c.kl.p95),
    "KL 99th percentile": lambda c: number(c.kl.p99),
    "KL max": lambda c: f"{number(c.kl.max)} at {c.kl.worst_position}",
    "top-1 agreement": lambda c: percent(c.agreement.top1),
    "top-5 agreement": lambda c: percent(c.agreement.top5),
    "top-1 flips": lambda c: f"{c.agreement.flips}",
    "… of them near ties": lambda c: f"{c.agreement.near_ties}",
    "largest margin that flipped": lambda c: number(c.agreement.largest_flip_margin),
    "worst state": lambda c: number(worst(c.states)),
    "perplexity: reference": _of_likelihood(lambda p: _digits(p.perplexity)),
    "perplexity: artifact": _of_likelihood(lambda p: _digits(p.perplexity_candidate)),
    "bits per byte: reference": _of_likelihood(lambda p: _digits(p.bits_per_byte)),
    "bits per byte: artifact": _of_likelihood(lambda p: _digits(p.bits_per_byte_candidate)),
    "Δ nats per token": _of_likelihood(lambda p: f"{p.delta:+.2g} ± {p.delta_standard_error:.1g}"),
}


def logits_table(r: Result) -> Table:
    """Returns all measured values, a column for each of `sides_of`."""
    names, sides = zip(*sides_of(r), strict=True)
    columns = tuple(LABELS[name] for name in names)
    return _table("Logits", ("measured",), columns, _rows(_MEASURED, sides))


def _rows(
    table: Mapping[str, Callable[[Compared], str]], sides: Iterable[Compared]
) -> Iterator[Row]:
    """Yields a name and a cell for each side; leaves out rows with empty cells only."""
    compared = list(sides)
    rows = ((name, *map(show, compared)) for name, show in table.items())
    return (row for row in rows if any(row[1:]))


def state_table(errors: Sequence[StateError]) -> Table:
    """Compares the states after the last token with the dequantized reference's."""
    rows = [
        (e.name, number(e.relative_max), number(e.relative_norm))
        for e in sorted(errors, key=lambda e: -e.relative_max)
    ]
    return _table("States", ("state",), ("max |Δ| / max", "norm"), _first(rows))


def drift_table(r: Result) -> Table:
    """Returns the worst state at several positions, a column for each of `sides_of`."""
    sides = [
        {drift.position: drift.states for drift in side.drift} | {r.text.tokens: side.states}
        for _, side in sides_of(r)
    ]
    rows = [
        (f"{at:,} tokens", *(number(worst(side[at])) if at in side else "" for side in sides))
        for at in sides[0]
    ]
    columns = tuple(LABELS[name] for name, _ in sides_of(r))
    return _table("Worst state by position", ("after",), columns, rows)


def itself_table(r: Result) -> Table:
    """Compares the same tokens in other chunks, batches and kernels."""
    rows = []
    for name, same in r.equivalences.items():
        state = number(worst(same.states)) if same.states else ""
        rows.append((SAME[name], f"{same.tokens}", number(same.logits.relative_max), state))
    return _table("Consistency", ("expected",), ("tokens", "logits", "states"), rows)


def file_table(file: AgainstFile) -> Table:
    """Returns the values measured against a reference file, over all prompts."""
    title = f"Against the reference file ({file.positions:,} of {file.tokens:,} positions)"
    return _table(title, ("measured",), ("reference file",), _rows(_MEASURED, [file]))


def prompt_cells(p: PromptResult) -> Row:
    """Returns the columns `PROMPT`."""
    return (
        f"{p.tokens:,}",
        f"{p.positions:,}",
        number(p.kl),
        percent(p.top1),
        number(p.worst_state),
        f"{p.greedy_common} of {p.greedy_tokens}" if p.greedy_tokens else "",
    )


def sketch_table(file: AgainstFile) -> Table:
    """Compares the stored weights with the reference file's sketches of the original's."""
    rows = _rows_by_scheme(
        file.weights,
        exact=lambda e: e.noise < _EXACT,
        rank=lambda e: e.noise,
        last=lambda e: e.worst_row,
        unchanged="as they were",
    )
    title = "Weights, by the reference file's sketches"
    return _table(title, ("tensor", "stored"), (*_TENSOR, "worst row"), rows)


def identity_table(r: Result) -> Table:
    """Compares configuration, tokenizer and other files; differences come first."""
    items = sorted(r.identity, key=lambda item: item.outcome in ("same", "not compared"))
    rows = [(item.name, item.outcome, item.artifact or "none", _expected(item)) for item in items]
    return Table("Identity", ("item", "outcome", "artifact", "compared with"), rows)


def _expected(item: IdentityItem) -> str:
    if item.outcome == "not compared":
        return item.reason
    return f"{item.reason} {item.expected or 'none'}"


def _rows_by_scheme(
    errors: Sequence[E],
    *,
    exact: Callable[[E], bool],
    rank: Callable[[E], float],
    last: Callable[[E], float],
    unchanged: str,
) -> Iterator[Row]:
    """Yields the worst tensors of each scheme, and the number that is stored exactly."""
    for scheme in dict.fromkeys(e.scheme for e in errors):
        group = [e for e in errors if e.scheme == scheme]
        inexact = sorted((e for e in group if not exact(e)), key=lambda e: -rank(e))
        for e in inexact[:WORST]:
            noise = number(e.noise), number(last(e))
            yield e.name, scheme, number(e.relative_error), f"{e.projection:.5f}", *noise
        if len(inexact) > WORST:
            yield f"… and {len(inexact) - WORST} with smaller errors", scheme, "", "", "", ""
        if count := len(group) - len(inexact):
            yield f"{count} tensors, {unchanged}", scheme, "0", "1", "0", "0"


def weight_table(errors: Sequence[WeightError]) -> Table:
    """Compares the stored weights with the original's."""
    rows = _rows_by_scheme(
        errors,
        exact=lambda e: e.max_steps == 0,
        rank=lambda e: e.relative_error,
        last=lambda e: e.max_steps,
        unchanged="stored unchanged",
    )
    return _table("Weights", ("tensor", "stored"), (*_TENSOR, "max steps"), rows)


def bisect_tables(
    report: SiteReport | None, costs: Sequence[LayerCost] | None, suspects: Sequence[Suspect]
) -> Iterator[Table]:
    """Yields suspects, ops and layers; none for an empty list."""
    if suspects:
        yield suspect_table(suspects)
    if report is not None:
        yield _site_table(report)
    if costs:
        yield _cost_table(costs)


def suspect_table(suspects: Sequence[Suspect]) -> Table:
    """Returns the likely causes of a failure, the strongest first."""
    rows = [(suspect.site, suspect.evidence) for suspect in suspects]
    return _table("Suspects", ("op", "evidence"), (), _first(rows, MOST, "more"))


def _site_table(report: SiteReport) -> Table:
    beyond, unseen = report.beyond, ""
    if report.unseen:
        unseen = f"; {len(report.unseen)} not shown by the engine"
    title = (
        "Per-op check: each op from the artifact's own inputs "
        f"({len(beyond)} of {len(report.errors)} beyond the limit{unseen})"
    )
    rows = list(_first(list(map(_site_row, beyond)), MOST, "more beyond the limit"))
    rows += [_site_row(error) for error in report.worst(WORST) if error.passed]
    return _table(title, ("op", "call"), ("rms", "median", "÷ limit"), rows)


def _site_row(e: SiteError) -> Row:
    where = e.site if e.state is None else f"state {e.state}"
    return where, e.call, number(e.rms), number(e.median), number(e.excess)


def _cost_table(costs: Sequence[LayerCost]) -> Table:
    """Returns all layers of a small model, and the most expensive ones of a large one."""
    total = sum(cost.kl for cost in costs) or 1
    ranked = sorted(costs, key=lambda cost: -cost.kl)
    most = len(ranked) if len(ranked) <= 2 * WORST + 2 else 2 * WORST
    rows = []
    for c in ranked[:most]:
        kl = plus_minus(c.kl, c.standard_error)
        rows.append((c.part, kl, f"{100 * c.kl / total:.1f} %", f"{100 * c.top1:.1f} %"))
    if rest := ranked[most:]:
        share = f"{100 * sum(cost.kl for cost in rest) / total:.1f} %"
        rows.append((f"… and {len(rest)} cheaper ones", "", share, ""))
    title = "Layers: KL to the original if only this one were stored so"
    return _table(title, ("part",), ("KL", "share", "top-1"), rows)


def overview(results: Sequence[Result]) -> Table:
    """Returns a row for each artifact; columns of `_OPTIONAL` only if a cell is not empty."""
    names = [
        name
        for name, show in _OVERVIEW.items()
        if name not in _OPTIONAL or any(show(result) for result in results)
    ]
    rows = [tuple(_OVERVIEW[name](result) for name in names) for result in results]
    return Table("Artifacts", tuple(names), rows, names[1:-1])


def _of_cost(show: Callable[[Compared], str]) -> Callable[[Result], str]:
    return lambda r: "" if (cost := cost_of(r)) is None else show(cost)


_OVERVIEW: dict[str, Callable[[Result], str]] = {
    "artifact": lambda r: r.artifact.path,
    "size": lambda r: amount(r.artifact.bytes),
    "bits": lambda r: f"{r.artifact.bits_per_weight:.2f}",
    "KL to original": _of_cost(lambda c: mean_kl(c.kl)),
    "Δperplexity": _of_cost(
        _of_likelihood(lambda p: f"{p.perplexity_candidate - p.perplexity:+.3g}")
    ),
    "top-1": _of_cost(lambda c: percent(c.agreement.top1)),
    "quality": lambda r: "" if r.quality is None else r.quality.grade,
    "tokens/s": lambda r: "" if r.speed is None else rate(r.speed.decode),
    "prompt/s": lambda r: "" if r.speed is None else rate(r.speed.prefill),
    "verdict": lambda r: r.verdict,
}
"""Column → a result's cell; bits are per weight."""
_OPTIONAL = "quality", "tokens/s", "prompt/s"
