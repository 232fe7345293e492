"""The outcome of `validate` as one HTML page, and its charts."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rgexport.reporting.chart import Chart, Series, logarithmic_axis, y_values
from rgexport.reporting.numbers import number, percent
from rgexport.reporting.page import page_environment, visible, write_text
from rgexport.units import amount
from rgexport.validate.bisect.sites import site_evidence
from rgexport.validate.checks import GRADES, verdict
from rgexport.validate.reference.against import AgainstFile
from rgexport.validate.report import sentences, tables
from rgexport.validate.report.sentences import ON_THE_TEXT, check_text, value_text
from rgexport.validate.result import Result

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
    "chart": "Where it differs",
    "ops": "Per-op check",
    "costs": "Layers by what their quantization costs",
    "identity": "Identity",
    "numbers": "All numbers",
    "itself": "Consistency",
    "file": "Against the reference file",
    "weights": "Weights",
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
        badge=sentences.verdict_text(*results),
        counts=sentences.counted_verdicts(results),
        overview=tables.overview(results),
        environment=results[0].environment,
        rgexport=results[0].environment["rgexport"],
    )


def piece(text: str) -> str:
    """Returns the text of a token on one line, with visible spaces."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def _view(anchor: str, r: Result) -> dict[str, Any]:
    """The variables of `artifact.html.j2`; `anchor` begins the ids of its elements."""
    count = len(r.checks) if r.verdict == "PASS" else sentences.counted_checks(r)
    failures, sites, quality = sentences.not_passed(r), r.sites, None
    if (q := r.quality) is not None:
        texts = {"doubt": sentences.doubt_text(q), "short": sentences.shortfall_text(r)}
        quality = {"grade": q.grade, "meaning": q.meaning, "tone": _TONES[q.grade], **texts}
    variables: dict[str, Any] = {
        "anchor": anchor,
        "result": r,
        "badge": sentences.verdict_text(r),
        "verdict": _VERDICTS[sentences.verdict_text(r)].format(count),
        "quality": quality,
        "cost": _cost(tables.cost_of(r)),
        "named": failures[: sentences.MOST_NAMED],
        "unnamed": len(failures[sentences.MOST_NAMED :]),
        "first_beyond": None if sites is None else sites.first,
        "tiles": list(_tiles(r)),
        "speed": sentences.speed_text(r),
        "source": sentences.source_text(r),
        "proof": sentences.proof_sentences(r),
        "texts": [(text, *sentences.answers_of(text)) for text in r.continuations or []],
        "suspects": tables.suspect_table(r.suspects) if r.suspects else None,
        "chart": _kl_chart(r),
        "drift": tables.drift_table(*tables.drift_of(r)),
        "ops": None if sites is None else tables.op_bars(sites),
        "costs": tables.cost_bars(r.layers) if r.layers else None,
        "identity": tables.identity_table(r) if r.identity else None,
        "numbers": tables.logits_table(r),
        "itself": tables.itself_table(r),
        "file": None if r.reference is None else _reference_file(r.reference),
        "weights": None if r.weights is None else tables.weight_table(r.weights),
        "worst": (r.original or r.dequantized).worst,
        "worst_against": sentences.LABELS["twin" if r.original is None else "original"],
    }
    always = {"compared", "checks", "files"}
    sections = [(key, name) for key, name in _SECTIONS.items() if key in always or variables[key]]
    return variables | {"contents": sections}


def _cost(c: tables.Compared | None) -> str:
    if c is None:
        return "What compression cost was not measured: the original was not given (-m)."
    by = ", by the reference file" if isinstance(c, AgainstFile) else ""
    same = f"the most likely token is the same at {percent(c.agreement.top1)} of the positions"
    return f"Compression cost {sentences.mean_kl(c.kl)} nats of KL per token{by}; {same}."


def _tiles(r: Result) -> Iterator[tuple[str, str, str, str]]:
    yield "size", amount(r.artifact.bytes), sentences.bits_text(r), ""
    if cost := tables.cost_of(r):
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
        "table": tables.file_table(file),
        "sketches": tables.sketch_table(file),
        "prompts": tables.prompt_bars(file),
        "drift": tables.drift_table(tables.DRIFT, {"worst": file.drift}) if file.drift else None,
    }


def _kl_chart(r: Result) -> Chart:
    sides = [(kind, sentences.LABELS[kind], side) for kind, side in reversed(tables.sides_of(r))]
    series = [Series(k, label, [(b.start, b.kl_mean) for b in s.blocks]) for k, label, s in sides]
    spans = {b.start: f"{b.start:,}–{b.stop - 1:,}" for b in r.dequantized.blocks}
    spans |= {b.start: f"{b.start:,}" for b in r.dequantized.blocks if b.stop - b.start == 1}
    ranges = ", ".join(f"against the {line.label} {_range(line)}" for line in series)
    return Chart(
        title="KL by position",
        summary=f"Mean KL per block of positions, {ranges}.",
        labels=("position in the text", "KL, nats"),
        series=series,
        y=logarithmic_axis(y_values(series)),
        column="positions",
        show_x=lambda x: spans[int(x)],
    )


def _range(line: Series) -> str:
    ys = [y for _, y in line.points if math.isfinite(y)]
    missing = len(line.points) - len(ys)
    text = f"{number(min(ys))} to {number(max(ys))}" if ys else "no finite value"
    return f"{text}, {missing} of {len(line.points)} not finite" if missing and ys else text
