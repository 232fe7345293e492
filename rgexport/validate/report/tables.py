"""The tables of a result, for the terminal and the page."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rgexport.reporting.numbers import number, percent, plus_minus
from rgexport.reporting.tables import BarTable, Row, Table
from rgexport.units import amount
from rgexport.validate.bisect.site_report import SiteReport
from rgexport.validate.bisect.sites import SiteError
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.costs import LayerCost
from rgexport.validate.equivalences import SAME
from rgexport.validate.measure import Comparison
from rgexport.validate.metrics import Drift, Likelihood, worst
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report.sentences import LABELS, mean_kl
from rgexport.validate.result import ValidationResult
from rgexport.validate.weights.tensor_errors import TensorError
from rgexport.validate.weights.weight_errors import WeightError

WORST = 5
"""Rows of tables that show only the worst."""
_EXACT = 0.05  # noise below this is the sketch's own rounding

Compared = Comparison | AgainstFile


def sides_of(r: ValidationResult) -> list[tuple[str, Comparison]]:
    """The comparisons with models, and the names of their fields."""
    return [("twin", r.dequantized)] + ([] if r.original is None else [("original", r.original)])


def cost_of(r: ValidationResult) -> Compared | None:
    """The comparison that measures the cost: with the original, or a reference file."""
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


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None else f"{before:.4g} → {after:.4g}"


def _perplexity_change(p: Likelihood) -> str:
    percents = 100 * p.perplexity_candidate / p.perplexity
    return f"{percents - 100:+.2f} ± {percents * p.delta_standard_error:.1g} %"


def summary_table(r: ValidationResult) -> Table:
    """The most important numbers, a column for each comparison; the cost comes first."""
    sides = {
        LABELS["original"]: r.original,
        "reference file": r.reference,
        LABELS["twin"]: r.dequantized,
    }
    present = {name: side for name, side in sides.items() if side is not None}
    return _measured_table("", "compared with", present, _SUMMARY)


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
    "perplexity": _of_likelihood(lambda p: _change(p.perplexity, p.perplexity_candidate)),
    "bits per byte": _of_likelihood(lambda p: _change(p.bits_per_byte, p.bits_per_byte_candidate)),
    "Δ nats per token": _of_likelihood(lambda p: f"{p.delta:+.2g} ± {p.delta_standard_error:.1g}"),
}
_SUMMARY = (
    "KL mean (nats)",
    "top-1 agreement",
    "RMS logit error, of their spread",
    "worst state",
    "perplexity",
)
"""The most important rows of `_MEASURED`."""


def logits_table(r: ValidationResult) -> Table:
    """All measured values, a column for each of `sides_of`."""
    return _measured_table("Logits", "measured", {LABELS[name]: side for name, side in sides_of(r)})


def _measured_table(
    title: str, first: str, sides: Mapping[str, Compared], names: Iterable[str] = _MEASURED
) -> Table:
    """Rows of `_MEASURED` that any side has a value of, a column for each side."""
    rows = [(name, *map(_MEASURED[name], sides.values())) for name in names]
    return _table(title, (first,), tuple(sides), (row for row in rows if any(row[1:])))


def drift_table(r: ValidationResult) -> Table:
    """The worst state on the way and at the end."""
    end = r.text.tokens
    sides = {
        LABELS[name]: [*side.drift, Drift(position=end, states=side.states)]
        for name, side in sides_of(r)
    }
    return _drift_table("Worst state by position", sides)


def file_drift_table(file: AgainstFile) -> Table:
    return _drift_table("Recurrent states inside the longest prompt", {"worst": file.drift})


def _drift_table(title: str, sides: Mapping[str, Sequence[Drift]]) -> Table:
    """The worst state at several positions, a column for each side."""
    columns = [{d.position: number(worst(d.states)) for d in side} for side in sides.values()]
    rows = [(f"{at:,} tokens", *(cells.get(at, "") for cells in columns)) for at in columns[0]]
    return _table(title, ("after",), tuple(sides), rows)


def itself_table(r: ValidationResult) -> Table:
    rows = []
    for name, same in r.equivalences.items():
        state = number(worst(same.states)) if same.states else ""
        rows.append((SAME[name], f"{same.tokens}", number(same.logits.relative_max), state))
    return _table("Consistency", ("expected",), ("tokens", "logits", "states"), rows)


def file_table(file: AgainstFile) -> Table:
    title = f"Against the reference file ({file.positions:,} of {file.tokens:,} positions)"
    return _measured_table(title, "measured", {"reference file": file})


def prompt_bars(file: AgainstFile) -> BarTable:
    numbers = ("tokens", "positions", "KL mean", "top-1", "worst state", "greedy")
    rows = []
    for p in file.prompts:
        greedy = f"{p.greedy_common} of {p.greedy_tokens}" if p.greedy_tokens else ""
        measured = number(p.kl), percent(p.top1), number(p.worst_state), greedy
        rows.append((p.name, f"{p.tokens:,}", f"{p.positions:,}", *measured))
    return _kl_bars("Prompts", "prompt", numbers, rows, [p.kl for p in file.prompts])


def weight_table(errors: Sequence[WeightError]) -> Table:
    return _tensor_table("Weights", "max steps", [(e, e.max_steps) for e in errors])


def sketch_table(file: AgainstFile) -> Table:
    """Compares the stored weights with the reference file's sketches of the original's."""
    title = "Weights, by the reference file's sketches"
    return _tensor_table(title, "worst row", [(e, e.worst_row) for e in file.weights])


def _tensor_table(title: str, last: str, errors: Sequence[tuple[TensorError, float]]) -> Table:
    """The worst tensors of each scheme, with the value of the `last` column."""
    rows: list[Row] = []
    for scheme in dict.fromkeys(e.scheme for e, _ in errors):
        group = [one for one in errors if one[0].scheme == scheme]
        changed = [one for one in group if not one[0].noise < _EXACT]
        ranked = sorted(changed, key=lambda one: -one[0].relative_error)
        rows += _first([(e.name, scheme, *_figures(e), number(value)) for e, value in ranked])
        if count := len(group) - len(changed):
            rows.append((f"{count} tensors, stored unchanged", scheme, "0", "1", "0", "0"))
    return _table(title, ("tensor", "stored"), ("error", "projection", "noise", last), rows)


def _figures(e: TensorError) -> Row:
    return number(e.relative_error), f"{e.projection:.5f}", number(e.noise)


def bisect_tables(r: ValidationResult) -> Iterator[Table]:
    """Yields suspects and the most expensive layers; none for an empty list."""
    if r.suspects:
        yield suspect_table(r.suspects)
    if r.layers:
        table = cost_bars(r.layers)
        yield replace(table, rows=list(_first([*table.rows], 2 * WORST, "cheaper ones")))


def suspect_table(suspects: Sequence[Suspect]) -> Table:
    rows = [(suspect.site, suspect.evidence) for suspect in suspects]
    return _table("Suspects", ("op", "evidence"), (), _first(rows, 30, "more"))


def op_bars(report: SiteReport) -> BarTable:
    """The worst op and state of each kind."""
    worst_of: dict[str, SiteError] = {}
    for error in report.errors:
        kind = error.op if error.state is None else f"state {error.state.rpartition('.')[2]}"
        if kind not in worst_of or worst_of[kind].excess < error.excess:
            worst_of[kind] = error
    ranked = sorted(worst_of.items(), key=lambda item: -item[1].excess)
    rows = [
        (kind, number(e.excess), e.state or e.site, e.call, number(e.rms), number(e.median))
        for kind, e in ranked
    ]
    unseen = f"; {len(report.unseen)} not shown by the engine" if report.unseen else ""
    counts = f"({len(report.beyond)} of {len(report.errors)} beyond the limit{unseen})"
    return BarTable(
        title=f"Per-op check: each op from the artifact's own inputs {counts}",
        header=("op", "÷ limit", "where it is worst", "call", "rms", "median"),
        rows=rows,
        numbers=("÷ limit", "rms", "median"),
        bar="share of the limit",
        shares=[e.excess for _, e in ranked],
    )


def cost_bars(costs: Sequence[LayerCost]) -> BarTable:
    """All parts, the most expensive first."""
    total = sum(cost.kl for cost in costs) or 1
    ranked = sorted(costs, key=lambda cost: -cost.kl)
    rows = [
        (c.part, plus_minus(c.kl, c.standard_error), percent(c.kl / total), percent(c.top1))
        for c in ranked
    ]
    title = "Layers: KL to the original if only this one were stored so"
    return _kl_bars(title, "part", ("KL, nats", "share", "top-1"), rows, [c.kl for c in ranked])


def _kl_bars(
    title: str, first: str, numbers: Row, rows: Sequence[Row], kl: Sequence[float]
) -> BarTable:
    """Bars as long as shares of the largest KL; none for NaN."""
    largest = max((value for value in kl if value == value), default=0) or 1
    shares = [value / largest if value == value else 0.0 for value in kl]
    header = first, *numbers
    return BarTable(title=title, header=header, rows=rows, numbers=numbers, bar="KL", shares=shares)


def overview(results: Sequence[ValidationResult]) -> Table:
    """A row for each artifact; `quality` only if there is one."""
    names = [name for name in _OVERVIEW if name != "quality" or any(r.quality for r in results)]
    rows = [tuple(_OVERVIEW[name](result) for name in names) for result in results]
    return Table("Artifacts", tuple(names), rows, names[1:-1])


def _of_cost(show: Callable[[Compared], str]) -> Callable[[ValidationResult], str]:
    return lambda r: "" if (cost := cost_of(r)) is None else show(cost)


_OVERVIEW: dict[str, Callable[[ValidationResult], str]] = {
    "artifact": lambda r: r.artifact.path,
    "size": lambda r: amount(r.artifact.bytes),
    "bits/weight": lambda r: f"{r.artifact.matrix_bits_per_weight:.2f}",
    "KL (nats/token)": _of_cost(lambda c: mean_kl(c.kl)),
    "Δperplexity": _of_cost(_of_likelihood(_perplexity_change)),
    "top-1": _of_cost(lambda c: percent(c.agreement.top1)),
    "quality": lambda r: "" if r.quality is None else r.quality.grade,
    "verdict": lambda r: r.verdict,
}
"""Column → a result's cell."""
