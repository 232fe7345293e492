"""What the page's templates show of one artifact."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rgexport.tables import Row
from rgexport.units import amount
from rgexport.validate.bisect.layer_costs import LayerCost
from rgexport.validate.bisect.site_errors import SiteError
from rgexport.validate.quality import Quality
from rgexport.validate.reference.against import AgainstFile, PromptResult
from rgexport.validate.report.charts import charts, kinds_chart, rms, site_charts
from rgexport.validate.report.result_tables import (
    DRIFT,
    PROMPT,
    Compared,
    cost_of,
    file_table,
    identity_table,
    itself_table,
    logits_table,
    prompt_cells,
    sketch_table,
    suspect_table,
)
from rgexport.validate.report.words import (
    LABELS,
    MOST_NAMED,
    ON_THE_TEXT,
    answers_of,
    bits_words,
    counted_checks,
    doubt_words,
    mean_kl,
    not_passed,
    number,
    part_words,
    percent,
    plus_minus,
    shortfall_words,
    source_words,
    speed_words,
    verdict_words,
)
from rgexport.validate.result import Result
from rgexport.validate.weights.weight_errors import WeightError

_LAYER = re.compile(r"layers\.\d+\.")
_VERDICTS = {
    "PASS": "The export is correct: all {} checks passed.",
    ON_THE_TEXT: "All {} checks passed, but the graph was not compared with the exporter's.",
    "AMBIGUOUS": "{}: the limit lies within the error margin.",
    "FAIL": "{}.",
}
_TONES = {
    "lossless": "good",
    "excellent": "good",
    "good": "good",
    "fair": "unsure",
    "poor": "bad",
}
"""Grade → the CSS class of its colour."""
_SECTIONS = {
    "compared": "What was compared",
    "texts": "Answers side by side",
    "suspects": "Suspects",
    "charts": "Where it differs",
    "ops": "Per-op check",
    "costs": "Layers by what their quantization costs",
    "identity": "Identity",
    "numbers": "All numbers",
    "itself": "Consistency",
    "file": "Against the reference file",
    "weights": "Weights by role",
    "worst": "The worst positions",
    "checks": "Checks and their limits",
    "files": "Files",
}
"""The end of a section's id → its title, in the order of the page."""


@dataclass(frozen=True)
class BarTable:
    """A table with a bar in each row.

    Attributes:
        header: the columns but the bar.
        numbers: columns that are set flush right.
        bar: what the bars show.
        rows: as in `Table`.
        shares: the lengths of the bars, 1 being the whole length; beyond that they turn red.
    """

    header: Row
    numbers: Row
    bar: str
    rows: Sequence[Row]
    shares: list[float]


def view(anchor: str, r: Result) -> dict[str, Any]:
    """The variables of `artifact.html.j2`; `anchor` begins the ids of its elements."""
    count = len(r.checks) if r.verdict == "PASS" else counted_checks(r)
    named, file, sites = not_passed(r), r.reference, r.sites
    compared = r.original or r.twin
    found: dict[str, Any] = {
        "anchor": anchor,
        "result": r,
        "badge": verdict_words(r),
        "verdict": _VERDICTS[verdict_words(r)].format(count),
        "quality": None if r.quality is None else _quality_view(r, r.quality),
        "cost": " ".join(_cost(cost_of(r))),
        "named": named[:MOST_NAMED],
        "unnamed": len(named[MOST_NAMED:]),
        "first_beyond": None if sites is None else sites.first,
        "tiles": list(_tiles(r)),
        "speed": speed_words(r),
        "source": source_words(r),
        "parts": part_words(r),
        "texts": [(one, *answers_of(one)) for one in r.continuations or []],
        "suspects": suspect_table(r.suspects) if r.suspects else None,
        "charts": list(charts(r)),
        "ops": None if sites is None else op_bars(sites.errors),
        "site_charts": [] if sites is None else list(site_charts(sites)),
        "costs": _cost_bars(r.layers or []),
        "identity": identity_table(r) if r.identity else None,
        "numbers": logits_table(r),
        "itself": itself_table(r),
        "file": None if file is None else _file_view(file),
        "weights": None if r.weights is None else _weights_view(r.weights),
        "worst": compared.worst,
        "worst_against": LABELS["twin" if r.original is None else "original"],
    }
    there = found | {"compared": r, "checks": r, "files": r}
    return found | {"contents": [(key, name) for key, name in _SECTIONS.items() if there[key]]}


def _quality_view(r: Result, q: Quality) -> dict[str, str]:
    """The second verdict, for the head of the page."""
    return {
        "grade": q.grade,
        "tone": _TONES[q.grade],
        "doubt": doubt_words(q),
        "meaning": f"{q.meaning} {shortfall_words(r)}".rstrip(),
    }


def _cost(c: Compared | None) -> Iterator[str]:
    if c is None:
        yield "What compression cost was not measured: the original was not given (-m)."
        return
    by = ", by the reference file" if isinstance(c, AgainstFile) else ""
    yield (
        f"Compression cost {mean_kl(c.kl)} nats of KL per token{by}; the most likely token is the "
        f"same at {percent(c.agreement.top1)} of the positions."
    )
    if c.likelihood is not None:
        before, after = c.likelihood.perplexity, c.likelihood.perplexity_candidate
        yield f"Perplexity went from {before:.4g} to {after:.4g}."


def _tiles(r: Result) -> Iterator[tuple[str, str, str, str]]:
    """Label, value, explanation, and the CSS class of what it was measured against."""
    yield "size", amount(r.artifact.bytes), bits_words(r), ""
    if cost := cost_of(r):
        error = f"± {cost.kl.standard_error:.1g} nats per token, to the original"
        yield "KL", number(cost.kl.mean), error, "original"
        same = "positions with the original's most likely token"
        yield "top-1 agreement", percent(cost.agreement.top1), same, "original"
        if found := cost.likelihood:
            from_to = f"from {found.perplexity:.4g} to {found.perplexity_candidate:.4g}"
            more = 100 * (found.perplexity_candidate / found.perplexity - 1)
            yield "perplexity", f"{more:+.2g} %", from_to, "original"
    limit = r.tolerance.at(r.text.tokens).rms
    against = f"to the dequantized reference, limit {number(limit)}"
    yield "RMS logit error", number(r.twin.logits.relative_rms), against, "twin"


def _file_view(found: AgainstFile) -> dict[str, Any]:
    return {
        "table": file_table(found),
        "sketches": sketch_table(found),
        "prompts": _prompt_bars(found.prompts),
        "charts": list(kinds_chart(DRIFT, found.drift)),
    }


def _weights_view(weights: Sequence[WeightError]) -> dict[str, Any]:
    rounded = [error for error in weights if error.max_steps != 0]
    return {"roles": role_bars(rounded), "exact": len(weights) - len(rounded)}


def op_bars(errors: Sequence[SiteError]) -> BarTable:
    """The worst op and state of each kind."""
    worst: dict[str, SiteError] = {}
    for error in errors:
        kind = error.op if error.state is None else f"state {error.state.rpartition('.')[2]}"
        if kind not in worst or worst[kind].excess < error.excess:
            worst[kind] = error
    ranked = sorted(worst.items(), key=lambda item: -item[1].excess)
    rows = [
        (kind, number(e.excess), e.state or e.site, e.call, number(e.rms), number(e.median))
        for kind, e in ranked
    ]
    header = ("op", "÷ limit", "where it is worst", "call", "rms", "median")
    numbers = (header[1], *header[4:])
    return BarTable(header, numbers, "share of the limit", rows, [e.excess for _, e in ranked])


def _cost_bars(costs: Sequence[LayerCost]) -> BarTable | None:
    """What each part costs, the most expensive one first."""
    ranked = sorted(costs, key=lambda cost: -cost.kl)
    numbers = ("KL, nats", "top-1 agreement")
    rows = [(c.part, plus_minus(c.kl, c.standard_error), percent(c.top1)) for c in ranked]
    shares = _of_largest([cost.kl for cost in ranked])
    return BarTable(("part", *numbers), numbers, "KL", rows, shares) if rows else None


def _prompt_bars(prompts: Sequence[PromptResult]) -> BarTable:
    rows = [(prompt.name, *prompt_cells(prompt)) for prompt in prompts]
    shares = _of_largest([prompt.kl for prompt in prompts])
    return BarTable(("prompt", *PROMPT), PROMPT, "mean KL", rows, shares)


def role_bars(weights: Sequence[WeightError]) -> BarTable | None:
    """Tensors that play one role in all layers and are stored in one way, the worst first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for error in weights:
        role = _LAYER.sub("", error.name).removesuffix(".weight")
        groups.setdefault((role, error.scheme), []).append(error.relative_error)
    ranked = sorted(groups.items(), key=lambda item: -rms(item[1]))
    numbers = ("tensors", "rms error", "worst")
    rows = [
        (*names, str(len(errors)), number(rms(errors)), number(max(errors)))
        for names, errors in ranked
    ]
    shares = _of_largest([rms(errors) for _, errors in ranked])
    header = ("role", "stored as", *numbers)
    return BarTable(header, numbers, "rms error", rows, shares) if rows else None


def _of_largest(values: Sequence[float]) -> list[float]:
    """Shares of the largest value; 0 for NaN."""
    largest = max((value for value in values if value == value), default=0) or 1
    return [value / largest if value == value else 0.0 for value in values]
