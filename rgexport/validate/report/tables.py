"""The tables of a result, for the terminal and the page."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_EXACT = 0.05
"""Noise below this is the sketch's own rounding."""

Compared = Comparison | AgainstFile


def sides_of(r: ValidationResult) -> list[tuple[str, Comparison]]:
    """Returns the comparisons with models, each after the name of its field."""
    sides = [("twin", r.dequantized)]
    if r.original is not None:
        sides.append(("original", r.original))
    return sides


def cost_of(r: ValidationResult) -> Compared | None:
    """Returns the comparison that measures the cost: with the original, or a reference file."""
    return r.original or r.reference


def _table(title: str, names: Row, numbers: Row, rows: Iterable[Row]) -> Table:
    return Table(title, (*names, *numbers), list(rows), numbers)


def _first(
    rows: Sequence[Row], most: int = WORST, ending: str = "with smaller errors"
) -> Iterator[Row]:
    """Yields the first rows, and one that counts the others."""
    yield from rows[:most]
    hidden = len(rows) - most
    if hidden > 0:
        empty_cells = [""] * (len(rows[0]) - 1)
        yield f"… and {hidden} {ending}", *empty_cells


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None else f"{before:.4g} → {after:.4g}"


def summary_table(r: ValidationResult) -> Table:
    """Returns the most important numbers, a column for each comparison; the cost comes first."""
    sides = {
        LABELS["original"]: r.original,
        "reference file": r.reference,
        LABELS["twin"]: r.dequantized,
    }
    present = {name: side for name, side in sides.items() if side is not None}
    return _measured_table("", "compared with", present, _SUMMARY)


def _measured_values(side: Compared) -> dict[str, str]:
    """Returns all measured values of a comparison as text, by the names of their rows."""
    logits = side.logits
    kl = side.kl
    agreement = side.agreement
    return {
        "max |Δlogit|": number(logits.max),
        "… of the largest logit": number(logits.relative_max),
        "RMS logit error, of their spread": number(logits.relative_rms),
        "mean |Δlogit|": number(logits.mean),
        "mean cosine of logits": f"{logits.cosine:.6f}",
        "KL mean (nats)": mean_kl(kl),
        "KL median": number(kl.median),
        "KL 95th percentile": number(kl.p95),
        "KL 99th percentile": number(kl.p99),
        "KL max": f"{number(kl.max)} at {kl.worst_position}",
        "top-1 agreement": percent(agreement.top1),
        "top-5 agreement": percent(agreement.top5),
        "top-1 flips": f"{agreement.flips}",
        "… of them near ties": f"{agreement.near_ties}",
        "largest margin that flipped": number(agreement.largest_flip_margin),
        "worst state": number(worst(side.states)),
        **_likelihood_values(side.likelihood),
    }


def _likelihood_values(likelihood: Likelihood | None) -> dict[str, str]:
    if likelihood is None:
        return {"perplexity": "", "bits per byte": "", "Δ nats per token": ""}
    bits = _change(likelihood.bits_per_byte, likelihood.bits_per_byte_candidate)
    delta = f"{likelihood.delta:+.2g} ± {likelihood.delta_standard_error:.1g}"
    return {
        "perplexity": _change(likelihood.perplexity, likelihood.perplexity_candidate),
        "bits per byte": bits,
        "Δ nats per token": delta,
    }


_SUMMARY = (
    "KL mean (nats)",
    "top-1 agreement",
    "RMS logit error, of their spread",
    "worst state",
    "perplexity",
)
"""The most important rows of `_measured_values`."""


def logits_table(r: ValidationResult) -> Table:
    """Returns all measured values, a column for each of `sides_of`."""
    return _measured_table("Logits", "measured", {LABELS[name]: side for name, side in sides_of(r)})


def _measured_table(
    title: str, first: str, sides: Mapping[str, Compared], names: Iterable[str] | None = None
) -> Table:
    """Returns the rows of `_measured_values` with a value of any side, a column for each side."""
    columns = [_measured_values(side) for side in sides.values()]
    rows = []
    for name in names or columns[0]:
        cells = [column[name] for column in columns]
        if any(cells):
            rows.append((name, *cells))
    return _table(title, (first,), tuple(sides), rows)


def drift_table(r: ValidationResult) -> Table:
    """Returns the worst state on the way and at the end."""
    sides = {}
    for name, side in sides_of(r):
        end = Drift(position=r.text.tokens, states=side.states)
        sides[LABELS[name]] = [*side.drift, end]
    return _drift_table("Worst state by position", sides)


def file_drift_table(file: AgainstFile) -> Table:
    """Returns the worst state inside a reference file's longest prompt."""
    return _drift_table("Recurrent states inside the longest prompt", {"worst": file.drift})


def _drift_table(title: str, sides: Mapping[str, Sequence[Drift]]) -> Table:
    """Returns the worst state at several positions, a column for each side."""
    columns = [_worst_by_position(side) for side in sides.values()]
    rows = []
    for position in columns[0]:
        cells = [column.get(position, "") for column in columns]
        rows.append((f"{position:,} tokens", *cells))
    return _table(title, ("after",), tuple(sides), rows)


def _worst_by_position(side: Sequence[Drift]) -> dict[int, str]:
    return {drift.position: number(worst(drift.states)) for drift in side}


def itself_table(r: ValidationResult) -> Table:
    """Returns the errors of an artifact against itself."""
    rows = []
    for name, equivalence in r.equivalences.items():
        state = ""
        if equivalence.states:
            state = number(worst(equivalence.states))
        logits = number(equivalence.logits.relative_max)
        rows.append((SAME[name], f"{equivalence.tokens}", logits, state))
    return _table("Consistency", ("expected",), ("tokens", "logits", "states"), rows)


def file_table(file: AgainstFile) -> Table:
    """Returns all values that were measured against a reference file."""
    title = f"Against the reference file ({file.positions:,} of {file.tokens:,} positions)"
    return _measured_table(title, "measured", {"reference file": file})


def prompt_bars(file: AgainstFile) -> BarTable:
    """Returns a row for each prompt of a reference file."""
    numbers = ("tokens", "positions", "KL mean", "top-1", "worst state", "greedy")
    rows = []
    for prompt in file.prompts:
        greedy = ""
        if prompt.greedy_tokens:
            greedy = f"{prompt.greedy_common} of {prompt.greedy_tokens}"
        row = (
            prompt.name,
            f"{prompt.tokens:,}",
            f"{prompt.positions:,}",
            number(prompt.kl),
            percent(prompt.top1),
            number(prompt.worst_state),
            greedy,
        )
        rows.append(row)
    return _kl_bars("Prompts", "prompt", numbers, rows, [prompt.kl for prompt in file.prompts])


def weight_table(errors: Sequence[WeightError]) -> Table:
    """Returns the worst tensors by the original's weights."""
    return _tensor_table("Weights", "max steps", [(e, e.max_steps) for e in errors])


def sketch_table(file: AgainstFile) -> Table:
    """Compares the stored weights with the reference file's sketches of the original's."""
    title = "Weights, by the reference file's sketches"
    return _tensor_table(title, "worst row", [(e, e.worst_row) for e in file.weights])


def _tensor_table(title: str, last: str, errors: Sequence[tuple[TensorError, float]]) -> Table:
    """Returns the worst tensors of each scheme, with the value of the `last` column."""
    rows: list[Row] = []
    for scheme in dict.fromkeys(error.scheme for error, _ in errors):
        of_scheme = [(error, value) for error, value in errors if error.scheme == scheme]
        rows += _scheme_rows(scheme, of_scheme)
    return _table(title, ("tensor", "stored"), ("error", "projection", "noise", last), rows)


def _scheme_rows(scheme: str, errors: Sequence[tuple[TensorError, float]]) -> Iterator[Row]:
    """Yields the tensors with the largest errors, and the number of unchanged ones."""
    changed = [pair for pair in errors if not pair[0].noise < _EXACT]  # true for NaN
    rows = []
    for error, value in sorted(changed, key=lambda pair: -pair[0].relative_error):
        row = (
            error.name,
            scheme,
            number(error.relative_error),
            f"{error.projection:.5f}",
            number(error.noise),
            number(value),
        )
        rows.append(row)
    yield from _first(rows)
    unchanged = len(errors) - len(changed)
    if unchanged:
        yield f"{unchanged} tensors, stored unchanged", scheme, "0", "1", "0", "0"


def bisect_tables(r: ValidationResult) -> Iterator[Table]:
    """Yields suspects and the most expensive layers; none for an empty list."""
    if r.suspects:
        yield suspect_table(r.suspects)
    if r.layers:
        table = cost_bars(r.layers)
        yield replace(table, rows=list(_first([*table.rows], 2 * WORST, "cheaper ones")))


def suspect_table(suspects: Sequence[Suspect]) -> Table:
    """Returns the suspects with their evidence."""
    rows = [(suspect.site, suspect.evidence) for suspect in suspects]
    return _table("Suspects", ("op", "evidence"), (), _first(rows, 30, "more"))


def op_bars(report: SiteReport) -> BarTable:
    """Returns the worst op and state of each kind."""
    worst_of: dict[str, SiteError] = {}
    for error in report.errors:
        kind = error.op
        if error.state is not None:
            kind = f"state {error.state.rpartition('.')[2]}"
        if kind not in worst_of or worst_of[kind].excess < error.excess:
            worst_of[kind] = error

    rows = []
    shares = []
    for kind, error in sorted(worst_of.items(), key=lambda item: -item[1].excess):
        site = error.state or error.site
        errors = (number(error.rms), number(error.median))
        rows.append((kind, number(error.excess), site, error.call, *errors))
        shares.append(error.excess)

    counts = f"{len(report.beyond)} of {len(report.errors)} beyond the limit"
    if report.unseen:
        counts += f"; {len(report.unseen)} not shown by the engine"
    return BarTable(
        title=f"Per-op check: each op from the artifact's own inputs ({counts})",
        header=("op", "÷ limit", "where it is worst", "call", "rms", "median"),
        rows=rows,
        numbers=("÷ limit", "rms", "median"),
        bar="share of the limit",
        shares=shares,
    )


def cost_bars(costs: Sequence[LayerCost]) -> BarTable:
    """Returns all parts of the model, the most expensive first."""
    total = sum(cost.kl for cost in costs) or 1
    ranked = sorted(costs, key=lambda cost: -cost.kl)
    rows = []
    for cost in ranked:
        kl = plus_minus(cost.kl, cost.standard_error)
        rows.append((cost.part, kl, percent(cost.kl / total), percent(cost.top1)))
    title = "Layers: KL to the original if only this one were stored so"
    numbers = ("KL, nats", "share", "top-1")
    return _kl_bars(title, "part", numbers, rows, [cost.kl for cost in ranked])


def _kl_bars(
    title: str, first: str, numbers: Row, rows: Sequence[Row], kl: Sequence[float]
) -> BarTable:
    """Returns a table with bars as long as shares of the largest KL; none for NaN."""
    known = [value for value in kl if not math.isnan(value)]
    largest = max(known, default=0) or 1
    shares = [0.0 if math.isnan(value) else value / largest for value in kl]
    header = (first, *numbers)
    return BarTable(title=title, header=header, rows=rows, numbers=numbers, bar="KL", shares=shares)


def overview(results: Sequence[ValidationResult]) -> Table:
    """Returns a row for each artifact; `quality` only if there is one."""
    cells = [_overview_cells(result) for result in results]
    names = list(cells[0])
    if not any(result.quality for result in results):
        names.remove("quality")
    rows = [tuple(row[name] for name in names) for row in cells]
    return Table("Artifacts", tuple(names), rows, names[1:-1])


def _overview_cells(r: ValidationResult) -> dict[str, str]:
    """Returns column → the cell of an artifact."""
    kl = ""
    perplexity = ""
    top1 = ""
    cost = cost_of(r)
    if cost is not None:
        kl = mean_kl(cost.kl)
        top1 = percent(cost.agreement.top1)
        if cost.likelihood is not None:
            perplexity = _perplexity_change(cost.likelihood)
    quality = ""
    if r.quality is not None:
        quality = r.quality.grade
    return {
        "artifact": r.artifact.path,
        "size": amount(r.artifact.bytes),
        "bits/weight": f"{r.artifact.matrix_bits_per_weight:.2f}",
        "KL (nats/token)": kl,
        "Δperplexity": perplexity,
        "top-1": top1,
        "quality": quality,
        "verdict": r.verdict,
    }


def _perplexity_change(likelihood: Likelihood) -> str:
    percents = 100 * likelihood.perplexity_candidate / likelihood.perplexity
    margin = percents * likelihood.delta_standard_error
    return f"{percents - 100:+.2f} ± {margin:.1g} %"
