"""The numbers that matter most, against everything that an artifact was compared with."""

from collections.abc import Callable

from rgexport.tables import Table
from rgexport.validate.measure import Comparison
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report.report_words import LABELS, number, percent
from rgexport.validate.result import Result
from rgexport.validate.states import worst

Compared = Comparison | AgainstFile


def _perplexity(c: Compared) -> str:
    found = c.likelihood
    return "" if found is None else f"{found.perplexity:.4g} → {found.perplexity_candidate:.4g}"


_ROWS: dict[str, Callable[[Compared], str]] = {
    "KL, nats per token": lambda c: f"{number(c.kl.mean)} ± {c.kl.standard_error:.1g}",
    "top-1 agreement": lambda c: percent(c.agreement.top1),
    "RMS logit error": lambda c: number(c.logits.relative_rms),
    "worst state error": lambda c: number(worst(c.states)),
    "perplexity": _perplexity,
}


def compared_with(r: Result) -> dict[str, Compared]:
    """Name → comparison, of those that were made; the cost of compression first."""
    found = {
        LABELS["original"]: r.original,
        "reference file": r.reference,
        LABELS["twin"]: r.twin,
    }
    return {name: comparison for name, comparison in found.items() if comparison is not None}


def summary_table(r: Result) -> Table:
    """A column for each; what was measured of none of them has no row."""
    found = compared_with(r)
    cells = {name: [show(c) for c in found.values()] for name, show in _ROWS.items()}
    rows = [(name, *row) for name, row in cells.items() if any(row)]
    return Table("", ("compared with", *found), rows, tuple(found))
