"""The outcome of `validate` as one HTML page."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rgexport.reporting.numbers import number, percent, plus_minus
from rgexport.reporting.page import page_environment, visible, write_text
from rgexport.reporting.tables import BarTable
from rgexport.units import amount
from rgexport.validate.bisect.site_errors import SiteError
from rgexport.validate.bisect.suspects import site_evidence
from rgexport.validate.checks import verdict
from rgexport.validate.costs import LayerCost
from rgexport.validate.quality import GRADES
from rgexport.validate.reference.against import AgainstFile, PromptResult
from rgexport.validate.report.charts import charts, cost_charts, kinds_chart, rms, site_charts
from rgexport.validate.report.sentences import (
    LABELS,
    MOST_NAMED,
    ON_THE_TEXT,
    answers_of,
    bits_text,
    check_text,
    counted_checks,
    counted_verdicts,
    doubt_text,
    mean_kl,
    not_passed,
    proof_sentences,
    quality_meaning,
    source_text,
    speed_text,
    value_text,
    verdict_text,
)
from rgexport.validate.report.tables import (
    DRIFT,
    PROMPT,
    Compared,
    cost_of,
    file_table,
    identity_table,
    itself_table,
    logits_table,
    overview,
    prompt_cells,
    sketch_table,
    suspect_table,
)
from rgexport.validate.result import Result
from rgexport.validate.weights.tensor_errors import WeightError

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


def write_html(results: Sequence[Result], path: Path) -> None:
    """Writes the page of one artifact or several.

    Raises:
        RequestError: the file cannot be written.
    """
    write_text(render_page(results), path)


def render_page(results: Sequence[Result]) -> str:
    """Returns the page: the verdict first, then a table of the artifacts if they are several."""
    environment = page_environment("validate.report")
    filters = amount, check_text, number, percent, piece, site_evidence, value_text
    environment.filters |= {f.__name__: f for f in filters}
    environment.globals["grades"] = GRADES
    return environment.get_template("page.html.j2").render(
        views=[_view(f"a{index}", result) for index, result in enumerate(results, 1)],
        verdict=verdict(check for result in results for check in result.checks),
        badge=verdict_text(*results),
        counts=counted_verdicts(results),
        overview=overview(results),
        costs=list(cost_charts(results)),
        environment=results[0].environment,
        rgexport=results[0].environment["rgexport"],
    )


def piece(text: str) -> str:
    """Returns the text of a token on one line, with visible spaces."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def _view(anchor: str, r: Result) -> dict[str, Any]:
    """Returns the variables of `artifact.html.j2`; `anchor` begins the ids of its elements."""
    count = len(r.checks) if r.verdict == "PASS" else counted_checks(r)
    failures, file, sites = not_passed(r), r.reference, r.sites
    variables: dict[str, Any] = {
        "anchor": anchor,
        "result": r,
        "badge": verdict_text(r),
        "verdict": _VERDICTS[verdict_text(r)].format(count),
        "quality": None,
        "cost": " ".join(_cost(cost_of(r))),
        "named": failures[:MOST_NAMED],
        "unnamed": len(failures[MOST_NAMED:]),
        "first_beyond": None if sites is None else sites.first,
        "tiles": list(_tiles(r)),
        "speed": speed_text(r),
        "source": source_text(r),
        "proof": proof_sentences(r),
        "texts": [(text, *answers_of(text)) for text in r.continuations or []],
        "suspects": suspect_table(r.suspects) if r.suspects else None,
        "charts": list(charts(r)),
        "ops": None if sites is None else op_bars(sites.errors),
        "site_charts": [] if sites is None else list(site_charts(sites)),
        "costs": _cost_bars(r.layers or []),
        "identity": identity_table(r) if r.identity else None,
        "numbers": logits_table(r),
        "itself": itself_table(r),
        "file": None if file is None else _reference_file(file),
        "weights": None if r.weights is None else _weights(r.weights),
        "worst": (r.original or r.dequantized).worst,
        "worst_against": LABELS["twin" if r.original is None else "original"],
    }
    if (q := r.quality) is not None:
        variables["quality"] = {
            "grade": q.grade,
            "tone": _TONES[q.grade],
            "doubt": doubt_text(q),
            "meaning": quality_meaning(r, q),
        }
    always = {"compared", "checks", "files"}
    sections = [(key, name) for key, name in _SECTIONS.items() if key in always or variables[key]]
    return variables | {"contents": sections}


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
    """Yields label, value, explanation, and the CSS class of the compared model."""
    yield "size", amount(r.artifact.bytes), bits_text(r), ""
    if cost := cost_of(r):
        error = f"± {cost.kl.standard_error:.1g} nats per token, to the original"
        yield "KL", number(cost.kl.mean), error, "original"
        same = "positions with the original's most likely token"
        yield "top-1 agreement", percent(cost.agreement.top1), same, "original"
        if likelihood := cost.likelihood:
            before, after = likelihood.perplexity, likelihood.perplexity_candidate
            change = f"{100 * (after / before - 1):+.2g} %"
            yield "perplexity", change, f"from {before:.4g} to {after:.4g}", "original"
    limit = r.tolerance.at(r.text.tokens).rms
    against = f"to the dequantized reference, limit {number(limit)}"
    yield "RMS logit error", number(r.dequantized.logits.relative_rms), against, "twin"


def _reference_file(file: AgainstFile) -> dict[str, Any]:
    return {
        "table": file_table(file),
        "sketches": sketch_table(file),
        "prompts": _prompt_bars(file.prompts),
        "charts": list(kinds_chart(DRIFT, file.drift)),
    }


def _weights(weights: Sequence[WeightError]) -> dict[str, Any]:
    rounded = [error for error in weights if error.max_steps != 0]
    return {"roles": role_bars(rounded), "exact": len(weights) - len(rounded)}


def op_bars(errors: Sequence[SiteError]) -> BarTable:
    """Returns the worst op and state of each kind."""
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
    """Groups tensors by their role and storage in all layers, the worst first."""
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
    """Returns shares of the largest value; 0 for NaN."""
    largest = max((value for value in values if value == value), default=0) or 1
    return [value / largest if value == value else 0.0 for value in values]
