"""Several artifacts side by side."""

from collections import Counter
from collections.abc import Callable, Sequence

from rgexport.progress import amount
from rgexport.tables import Table
from rgexport.validate.checks import Outcome, verdict
from rgexport.validate.measure import Comparison
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report.report_words import number, percent, rate
from rgexport.validate.result import Result


def verdict_of(results: Sequence[Result]) -> Outcome:
    """The worst of several."""
    return verdict(check for result in results for check in result.checks)


def counted_verdicts(results: Sequence[Result]) -> str:
    """Such as `1 of 3 fails, 2 are ambiguous`."""
    counts = Counter(result.verdict for result in results)
    if counts["PASS"] == len(results):
        return f"all {len(results)} pass"
    failed, unsure = counts["FAIL"], counts["AMBIGUOUS"]
    words = []
    if failed:
        words.append(f"{failed} of {len(results)} {'fails' if failed == 1 else 'fail'}")
    if unsure:
        of = "" if failed else f" of {len(results)}"
        words.append(f"{unsure}{of} {'is' if unsure == 1 else 'are'} ambiguous")
    return ", ".join(words)


def overview(results: Sequence[Result]) -> Table:
    """One row each; speeds are there if they were measured.

    Bits are per weight. What compression cost is told by the original or, where there is none, by
    a reference file.
    """
    names = [name for name in _COLUMNS if name not in _OPTIONAL or _any(name, results)]
    rows = [tuple(_COLUMNS[name](result) for name in names) for result in results]
    return Table("Artifacts", tuple(names), rows, names[1:-1])


def _any(name: str, results: Sequence[Result]) -> bool:
    return any(_COLUMNS[name](result) for result in results)


def _of_cost(show: Callable[[Comparison | AgainstFile], str]) -> Callable[[Result], str]:
    def column(r: Result) -> str:
        found = r.original or r.reference
        return "" if found is None else show(found)

    return column


def _more_perplexity(found: Comparison | AgainstFile) -> str:
    told = found.likelihood
    return "" if told is None else f"{told.perplexity_candidate - told.perplexity:+.3g}"


def _of_speed(field: str) -> Callable[[Result], str]:
    return lambda r: "" if r.speed is None else rate(getattr(r.speed, field))


_COLUMNS: dict[str, Callable[[Result], str]] = {
    "artifact": lambda r: r.artifact.path,
    "size": lambda r: amount(r.artifact.bytes),
    "bits": lambda r: f"{r.artifact.bits_per_weight:.2f}",
    "KL to original": _of_cost(lambda c: f"{number(c.kl.mean)} ± {c.kl.standard_error:.1g}"),
    "Δperplexity": _of_cost(_more_perplexity),
    "top-1": _of_cost(lambda c: percent(c.agreement.top1)),
    "tokens/s": _of_speed("decode"),
    "prompt/s": _of_speed("prefill"),
    "verdict": lambda r: r.verdict,
}
_OPTIONAL = "tokens/s", "prompt/s"
