"""The outcome of `validate` as one HTML page, and its charts."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from rgexport.reporting.chart import Chart, Series, logarithmic_axis, y_values
from rgexport.reporting.numbers import number, percent
from rgexport.reporting.page import page_environment, visible, write_text
from rgexport.reporting.tables import BarTable
from rgexport.units import amount
from rgexport.validate.bisect.sites import SiteError, SiteReport
from rgexport.validate.bisect.suspects import site_evidence
from rgexport.validate.checks import GRADES, verdict
from rgexport.validate.metrics import Drift, worst
from rgexport.validate.reference.against import AgainstFile
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
    Compared,
    cost_bars,
    cost_of,
    drift_of,
    file_table,
    identity_table,
    itself_table,
    logits_table,
    overview,
    prompt_bars,
    shares_of_largest,
    sides_of,
    sketch_table,
    suspect_table,
)
from rgexport.validate.result import Result
from rgexport.validate.weights.tensor_errors import WeightError

_LAYER = re.compile(r"layers\.\d+\.")
_MOST_NAME = 26
_VERDICTS = {
    "PASS": "The export is correct: all {} checks passed.",
    ON_THE_TEXT: "All {} checks passed, but the graph was not compared with the exporter's.",
    "AMBIGUOUS": "{}: the limit lies within the error margin.",
    "FAIL": "{}.",
}
_TONES = dict(lossless="good", excellent="good", good="good", fair="unsure", poor="bad")
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
    """Writes the page of one artifact or several; raises RequestError if it cannot."""
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
        costs=list(_size_chart(results)),
        environment=results[0].environment,
        rgexport=results[0].environment["rgexport"],
    )


def piece(text: str) -> str:
    """Returns the text of a token on one line, with visible spaces."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def _view(anchor: str, r: Result) -> dict[str, Any]:
    """The variables of `artifact.html.j2`; `anchor` begins the ids of its elements."""
    count = len(r.checks) if r.verdict == "PASS" else counted_checks(r)
    failures, file, sites, quality = not_passed(r), r.reference, r.sites, None
    if (q := r.quality) is not None:
        texts = {"doubt": doubt_text(q), "meaning": quality_meaning(r, q)}
        quality = {"grade": q.grade, "tone": _TONES[q.grade], **texts}
    variables: dict[str, Any] = {
        "anchor": anchor,
        "result": r,
        "badge": verdict_text(r),
        "verdict": _VERDICTS[verdict_text(r)].format(count),
        "quality": quality,
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
        "charts": list(_charts(r)),
        "ops": None if sites is None else _op_bars(sites.errors),
        "site_charts": [] if sites is None else list(_site_chart(sites)),
        "costs": cost_bars(r.layers) if r.layers else None,
        "identity": identity_table(r) if r.identity else None,
        "numbers": logits_table(r),
        "itself": itself_table(r),
        "file": None if file is None else _reference_file(file),
        "weights": None if r.weights is None else _weights(r.weights),
        "worst": (r.original or r.dequantized).worst,
        "worst_against": LABELS["twin" if r.original is None else "original"],
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
    drift = [Series("plain", "recurrent states", _worst_along(file.drift))] if file.drift else []
    return {
        "table": file_table(file),
        "sketches": sketch_table(file),
        "prompts": prompt_bars(file),
        "charts": [_drift_chart(DRIFT, drift)] if drift else [],
    }


def _weights(weights: Sequence[WeightError]) -> dict[str, Any]:
    """Groups tensors by their role and storage in all layers, the worst first."""
    rounded = [error for error in weights if error.max_steps != 0]
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for error in rounded:
        role = _LAYER.sub("", error.name).removesuffix(".weight")
        groups[role, error.scheme].append(error.relative_error)
    ranked = sorted(groups.items(), key=lambda item: -_rms(item[1]))
    rows = [
        (*names, str(len(errors)), number(_rms(errors)), number(max(errors)))
        for names, errors in ranked
    ]
    numbers = ("tensors", "rms error", "worst")
    shares = shares_of_largest([_rms(errors) for _, errors in ranked])
    roles = BarTable(("role", "stored as", *numbers), numbers, "rms error", rows, shares)
    return {"roles": roles if rows else None, "exact": len(weights) - len(rounded)}


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _op_bars(errors: Sequence[SiteError]) -> BarTable:
    """The worst op and state of each kind."""
    worst_of: dict[str, SiteError] = {}
    for error in errors:
        kind = error.op if error.state is None else f"state {error.state.rpartition('.')[2]}"
        if kind not in worst_of or worst_of[kind].excess < error.excess:
            worst_of[kind] = error
    ranked = sorted(worst_of.items(), key=lambda item: -item[1].excess)
    rows = [
        (kind, number(e.excess), e.state or e.site, e.call, number(e.rms), number(e.median))
        for kind, e in ranked
    ]
    header = ("op", "÷ limit", "where it is worst", "call", "rms", "median")
    numbers = (header[1], *header[4:])
    return BarTable(header, numbers, "share of the limit", rows, [e.excess for _, e in ranked])


def _charts(r: Result) -> Iterator[Chart]:
    """Charts KL and the worst state along the text; the original is drawn below the other."""
    sides = [(kind, LABELS[kind], side) for kind, side in reversed(sides_of(r))]
    series = [Series(k, label, [(b.start, b.kl_mean) for b in s.blocks]) for k, label, s in sides]
    spans = {b.start: f"{b.start:,}–{b.stop - 1:,}" for b in r.dequantized.blocks}
    spans |= {b.start: f"{b.start:,}" for b in r.dequantized.blocks if b.stop - b.start == 1}
    yield Chart(
        title="KL by position",
        summary=f"Mean KL per block of positions, {_ranges('against the {} {}', series)}.",
        labels=("position in the text", "KL, nats"),
        series=series,
        y=logarithmic_axis(y_values(series)),
        column="positions",
        show_x=lambda x: spans[int(x)],
    )
    if any(side.drift and side.states for *_, side in sides):
        drift = [Series(k, label, _worst_along(drift_of(r, side))) for k, label, side in sides]
        limits = [(x, r.tolerance.at(int(x)).states) for x, _ in drift[-1].points]
        limit = Series("limit", f"limit for the {LABELS['twin']}", limits)
        yield _drift_chart("Drift of the states", drift, limit)


def _worst_along(drift: Sequence[Drift]) -> list[tuple[float, float]]:
    return [(at.position, worst(at.states)) for at in drift]


def _drift_chart(title: str, series: list[Series], limit: Series | None = None) -> Chart:
    end = None if limit is None else limit.points[-1][1]
    text = f"Largest error of any state, relative to the largest value: {_ranges('{} {}', series)}"
    return Chart(
        title=title,
        summary=f"{text}." if end is None else f"{text}; limit {number(end)} at the end.",
        labels=("tokens, logarithmic", "max |Δ| ÷ max"),
        series=series,
        y=logarithmic_axis(y_values(series), end),
        limit=limit,
        doubling=True,
        column="tokens",
    )


def _site_chart(report: SiteReport) -> Iterator[Chart]:
    """Charts the worst op of each layer, states included, in units of its limit."""
    layers: dict[int, list[float]] = defaultdict(list)
    for error in report.errors:
        layers[-1 if error.layer is None else error.layer].append(error.excess)
    outside = layers.pop(-1, [])
    if not layers:
        return
    points = [(layer, float(np.max(excesses))) for layer, excesses in layers.items()]
    series = [Series("plain", "worst op", points, dots=True)]
    ranges = _ranges("{}: {}", series)
    if outside:
        ranges += f"; outside the layers: up to {number(float(np.max(outside)))}"
    yield Chart(
        title="Error of each layer's own ops",
        summary=f"Error ÷ limit, {ranges}. Values up to 1 pass.",
        labels=("layer", "error ÷ limit"),
        series=series,
        y=logarithmic_axis(y_values(series), 1.0),
        limit=Series("limit", "limit", [(0, 1.0)]),
    )


def _size_chart(results: Sequence[Result]) -> Iterator[Chart]:
    """Charts KL to the original by size, if at least two artifacts have an original."""
    costs = sorted(
        (r.artifact.bytes / 1e6, cost.kl.mean, PurePath(r.artifact.path).name)
        for r in results
        if (cost := cost_of(r)) is not None and math.isfinite(cost.kl.mean)
    )
    if len(costs) < 2:
        return
    names = [name if len(name) <= _MOST_NAME else f"{name[:_MOST_NAME]}…" for *_, name in costs]
    points = [(size, kl) for size, kl, _ in costs]
    listed = "; ".join(f"{name}: {size:,.0f} MB, {number(kl)}" for size, kl, name in costs)
    yield Chart(
        title="What compression costs, by size",
        summary=f"Mean KL in nats per token against the size of the files. {listed}.",
        labels=("size, MB", "KL, nats per token"),
        series=[Series("original", "KL to the original", points, dots=True, names=names)],
        y=logarithmic_axis([kl for _, kl in points]),
        column="size, MB",
        show_x="{:,.1f}".format,
    )


def _ranges(template: str, series: Sequence[Series]) -> str:
    return ", ".join(template.format(line.label, _range(line)) for line in series)


def _range(line: Series) -> str:
    ys = [y for _, y in line.points if math.isfinite(y)]
    missing = len(line.points) - len(ys)
    text = f"{number(min(ys))} to {number(max(ys))}" if ys else "no finite value"
    return f"{text}, {missing} of {len(line.points)} not finite" if missing and ys else text
