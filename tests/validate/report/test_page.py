import dataclasses
import itertools
import math
import re
from collections import Counter

import pytest

from rgexport import progress
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.continuations import Continuation
from rgexport.validate.opening import Request
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.report.charts import cost_charts, drift_chart, kinds_chart
from rgexport.validate.report.page import breakable, piece, render_page, visible, write_html
from rgexport.validate.report.page_view import op_bars, role_bars
from rgexport.validate.report.result_tables import bounded
from rgexport.validate.report.terminal import render, render_several
from rgexport.validate.report.words import MOST_NAMED
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
from rgexport.validate.speed import Speed
from rgexport.validate.states import worst
from tests.validate.report.changed_results import (
    HOSTILE,
    ambiguous,
    changed,
    hostile,
    with_site_beyond,
    without_torch,
)
from tests.validate.report.parsed_page import Page
from tests.validate.test_result import with_nan


@pytest.fixture(scope="module")
def result(clean, checkpoint, tmp_path_factory) -> Result:
    """With everything there can be; speed and suspects are invented."""
    file = capture(open_checkpoint(checkpoint), tmp_path_factory.mktemp("page") / "r", device="cpu")
    found = validate_artifact(
        clean("int4"),
        Request(model=str(checkpoint), max_tokens=70, bisect=True, reference=read_reference(file)),
    )
    speed = Speed(decode=123.4, prefill=5678.9, prompt_tokens=128)
    suspects = [Suspect(layer=1, site="layers.1.temporal_block.rg_lru", evidence="for the test")]
    return dataclasses.replace(found, speed=speed, suspects=suspects)


@pytest.fixture(scope="module")
def alone(clean) -> Result:
    return validate_artifact(clean("fp32"), Request(max_tokens=20))


@pytest.fixture(scope="module", params=["one", "several"])
def page(request, result, alone) -> Page:
    several = [result, alone, with_nan(result), without_torch(result), ambiguous(result)]
    return Page(render_page([with_site_beyond(result)] if request.param == "one" else several))


def test_the_page_needs_nothing_else_and_fits_every_screen(page):
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {"script", "img", "iframe", "object", "form", "base", "image", "use"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")
    policies = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    style = next(text for text in page.texts if ":root" in text)
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "max-width: 40rem" in style
    width = {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert width in page.named("meta")


def test_a_screen_reader_finds_its_way(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for target in (attributes.get("aria-labelledby") or "").split():
            assert target in ids
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in ids
    pictures = page.named("svg")
    assert pictures and len(page.named("desc")) == len(pictures)
    assert all(p["role"] == "img" and p["aria-labelledby"] for p in pictures)
    assert all(th.get("scope") in ("col", "row") for th in page.named("th"))
    assert len(page.named("table")) == len(page.named("thead")) == len(page.named("tbody"))
    assert page.named("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    elements = zip(page.elements, page.paths, strict=True)
    contents = [e[1]["href"] for e, path in elements if path[-4:] == ("nav", "ul", "li", "a")]
    named = [section.get("aria-labelledby") or "" for section in page.named("section")]
    assert contents == [f"#{name}" for name in named if re.fullmatch(r"a\d+-[a-z]+", name)]


def test_the_verdict_comes_first(result, alone):
    count = len(result.checks)
    text = Page(render_page([result])).text
    body = text[text.index("}") :]
    assert 0 < body.index("PASS") < body.index(f"The export is correct: all {count} checks")
    assert body.index("Compression cost") < body.index("What was compared")
    failed = Page(render_page([with_nan(result)])).text
    assert f"1 of {count} checks failed" in failed
    assert "twin.logits is nan, limit" in failed
    assert "the original was not given (-m)" in Page(render_page([alone])).text


def test_an_ambiguous_check_has_its_margin_and_its_colour(result):
    page = Page(render_page([ambiguous(result)]))
    assert f"1 of {len(result.checks)} checks cannot be decided" in page.text
    assert "twin.logits is 0.25 ± 0.04, limit 0.27" in page.text
    classes = [attributes.get("class") for _, attributes in page.elements]
    assert "verdict ambiguous" in classes and "unsure" in classes
    several = render_page([result, ambiguous(result)])
    assert several.index('class="verdict ambiguous"') < several.index("artifacts compared")


def test_of_many_failures_the_first_are_named_at_the_top(result):
    unsure = dataclasses.replace(result.checks[0], value=0.25, margin=0.04, limit=0.27)
    failed = [dataclasses.replace(check, value=math.nan) for check in [*result.checks] * 2]
    page = Page(render_page([dataclasses.replace(result, checks=[unsure, *failed])]))
    named = [path for path in page.paths if path[-3:] == ("header", "ul", "li")]
    assert len(named) == MOST_NAMED + 1
    assert f"and {len(failed) + 1 - MOST_NAMED} more" in page.text
    head = page.text[: page.text.index("What was compared")]
    assert "0.25 ± 0.04" not in head, "those that failed come first"
    text = render(dataclasses.replace(result, checks=[unsure, *failed]))
    assert text.count("FAILED  ") == MOST_NAMED and "AMBIGUOUS" not in text
    assert f"… and {len(failed) + 1 - MOST_NAMED} more\n" in text
    line = "SUSPECT  layers.1.temporal_block.rg_lru: for the test"
    assert render_several([result, with_nan(result)]).count(line) == 1


def test_both_texts_stand_side_by_side(result):
    written = Continuation(
        name="prose",
        prompt=HOSTILE,
        reference="the sea rose",
        artifact="the hill was green",
        tokens=16,
        common=1,
        shared="the ",
        reference_next="sea",
        artifact_next="hill",
    )
    both = dataclasses.replace(result, continuations=[written])
    shown = render_page([both])
    assert "the <mark>sea</mark> rose" in shown and "the <mark>hill</mark> was green" in shown
    assert "<script" not in shown
    assert "Answers side by side" not in render_page([result])
    lines = render(both).splitlines()
    index = next(i for i, line in enumerate(lines) if "1 of 16 tokens are the same" in line)
    assert lines[index + 1].split() == ["original", "the", "[sea]", "rose"]
    assert lines[index + 2].split() == ["artifact", "the", "[hill]", "was", "green"]


def test_size_and_cost_of_several_are_one_picture(result, alone):
    costs = {"original.kl.mean": 0.5}
    small, large = (
        changed(result, costs | {"artifact.path": f"out/{name}", "artifact.bytes": size})
        for name, size in (("small", 5_000_000), ("large", 9_000_000))
    )
    (chart,) = cost_charts([large, alone, small])
    assert chart.rows == [["5.0", "0.5"], ["9.0", "0.5"]]
    assert chart.series[0].names == ["small", "large"]
    assert list(cost_charts([large, alone])) == []
    assert "What compression costs, by size" in Page(render_page([large, small])).text


def test_the_numbers_are_those_of_the_result(result):
    text = Page(render_page([result])).text
    tiles = text[: text.index("How to read this")]
    assert f"KL {result.original.kl.mean:.3g} ± " in tiles
    assert f"top-1 agreement {100 * result.original.agreement.top1:.2f} %" in tiles
    assert f"RMS logit error {result.twin.logits.relative_rms:.3g} " in tiles
    assert f"{result.artifact.matrix_bits_per_weight:.2f} bits per weight" in tiles
    assert f"KL mean (nats) {result.twin.kl.mean:.3g} ±" in text
    assert "123 tokens/s one by one, 5,679 of a prompt of 128" in text
    for check in result.checks:
        margin = f" ± {check.margin:.1g}" if check.margin else ""
        assert f"{check.name} {check.value:.3g}{margin} {check.limit:.3g} PASS" in text
    for found in result.equivalences.values():
        assert f"{found.tokens} {found.logits.relative_max:.3g}" in text
    for place in result.original.worst:
        assert f"Position {place.position} KL {place.kl:.3g} nats" in text
        for choice in place.reference + place.candidate:
            assert f"#{choice.token} {100 * choice.probability:.2f} %" in text
    for value in (*result.artifact.files.values(), *result.environment.values()):
        assert str(value) in text
    text = text[text.index("Layers by what their quantization costs") :]
    ranked = sorted(result.layers, key=lambda cost: -cost.kl)
    places = [text.index(f"{cost.part} {cost.kl:.3g} ±") for cost in ranked]
    assert places == sorted(places)


def test_the_charts_show_both_sides(result, alone):
    plain = dataclasses.replace(result, reference=None, sites=None)
    lines = [c["class"] for c in Page(render_page([plain])).named("path") if "class" in c]
    assert lines.count("line original") == lines.count("line twin") == 3
    kinds = ("plain", "pale", "plain dashed", "pale dashed")
    assert [lines.count(f"line {kind}") for kind in kinds] == [1, 1, 1, 1], "no side's colour"
    assert "line original" not in [c.get("class") for c in Page(render_page([alone])).named("path")]
    dots = Page(render_page([plain])).named("circle")
    assert len(dots) == 2 * 3, "states and weights of three layers"


def test_states_drift_along_a_logarithm_below_a_limit_that_grows(result):
    assert [d.position for d in result.twin.drift] == [64]
    chart = drift_chart(changed(result, {"text.tokens": 1 << 20}))
    heights = [float(y) for y in chart.limit_path.split()[1::2]]
    assert heights == sorted(heights, reverse=True) and heights[0] > heights[-1]
    assert [label for _, label in chart.x.ticks][:2] == ["64", "512"]
    assert [row[0] for row in chart.rows] == ["64", "1,048,576"]
    (kinds,) = kinds_chart("title", result.twin.drift)
    assert [one.label for one in kinds.series] == ["rg_lru", "key", "conv1d", "value"]
    of_keys = [s for s in result.twin.drift[0].states if s.name.endswith(".key")]
    assert kinds.rows[0][2] == f"{worst(of_keys):.3g}" and kinds.limit is None
    bare = [dataclasses.replace(d, states=[]) for d in result.twin.drift]
    assert list(kinds_chart("title", bare)) == []


def test_a_reference_file_alone_makes_a_page(result):
    text = Page(render_page([without_torch(result)])).text
    assert "of KL per token, by the reference file" in text
    assert "left out, it takes torch" in text
    assert "All numbers" not in text and "The worst positions" not in text
    assert "Recurrent states inside the longest prompt" in text
    for prompt in result.reference.prompts:
        assert f"{prompt.name} {prompt.tokens:,} {prompt.kl:.3g}" in text


def test_the_streams_error_has_its_limit(result, monkeypatch):
    monkeypatch.setattr(progress, "verbose", True)
    assert result.reference.layers
    first = result.reference.layers[0]
    text = Page(render_page([result])).text
    assert f"the limit is {first.limit:.3g}" in text
    assert f"layer error 0 {first.relative_rms:.3g} 1 " in text
    said = render(result)
    assert "Residual stream after each layer" in said
    drift = result.reference.drift[0]
    assert re.search(rf"{drift.position} tokens +{worst(drift.states):.3g}\n", said)


def test_the_first_op_beyond_its_limit_is_named_at_the_top(result):
    page = Page(render_page([with_site_beyond(result)]))
    head = page.text[: page.text.index("What was compared")]
    assert "The first op beyond its limit is layers.1.temporal_block.rg_lru (rg_lru_scan)" in head
    assert "1 of" in page.text and "rg_lru_scan 7.25 layers.1.temporal_block.rg_lru" in page.text
    bars = [span.get("class") for span in page.named("span")]
    assert bars.count("bar beyond") == 1
    assert "beyond its limit is" not in Page(render_page([result])).text
    ops = op_bars(result.sites.errors)
    assert ops.shares == sorted(ops.shares, reverse=True) and ops.shares[0] <= 1
    (largest,) = result.sites.worst(1)
    assert ops.rows[0][1:3] == (f"{largest.excess:.3g}", largest.state or largest.site)
    assert {"linear", "rg_lru_scan", "state rg_lru", "state key"} <= {row[0] for row in ops.rows}


def test_a_value_that_is_not_finite_is_a_gap_and_is_counted(result):
    blocks = [dataclasses.replace(b, kl_mean=math.nan) for b in result.twin.blocks[5:7]]
    blocks = [*result.twin.blocks[:5], *blocks, *result.twin.blocks[7:]]
    page = Page(render_page([changed(result, {"twin.blocks": blocks})]))
    assert "2 of 70 not finite" in page.text
    (line,) = [p["d"] for p in page.named("path") if p.get("class") == "line twin"][:1]
    assert line.count("M") == 2 and "nan" not in line


def test_markup_from_outside_stays_text(result):
    ordinary, spoiled = (Page(render_page([r])) for r in (result, hostile(result)))
    tags = [Counter(tag for tag, _ in page.elements) for page in (ordinary, spoiled)]
    assert tags[1].keys() <= tags[0].keys() | {"wbr"}
    assert not tags[1].keys() & {"script", "img"}
    assert spoiled.text.count("onerror='alert(2)'>{{") >= 20
    assert "49" not in re.findall(r"onerror='alert\(2\)'>(\S+)", spoiled.text)
    assert len(Page(render_page([hostile(result)] * 2)).named("article")) == 2
    shown = render_page([hostile(result)])
    assert "<script" not in shown and "&lt;/script&gt;&lt;script&gt;" in shown


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (visible("a\nb\0\x1b[31m\x7f\x85"), "a↵\nb␀␛[31m␡⟨U+0085⟩"),
        (visible("\u202egnp.exe\ud800"), "⟨U+202E⟩gnp.exe⟨U+D800⟩"),
        (visible("👩\u200d🚀 é"), "👩\u200d🚀 é"),
        (piece(" the\n\t"), "␣the↵⇥"),
        (piece(""), "∅"),
        (breakable("layers.10.a_c<i>"), "layers.<wbr>10.<wbr>a_<wbr>c&lt;i&gt;"),
        (breakable("/d/e/another/one"), "/<wbr>d/<wbr>e/<wbr>another/<wbr>one"),
        (breakable("layers.10<i>"), "layers.10&lt;i&gt;"),
        (bounded(0.01234, 0.012341, 0.012339), "0.0123"),
        (bounded(1e-6, 9e-7, 2e-6), "1e-06 (9e-07 … 2e-06)"),
    ],
)
def test_names_pieces_and_bounds_are_readable(shown, expected):
    assert str(shown) == expected


def test_weights_by_role(result):
    bars = role_bars(result.weights)
    assert bars.shares[0] == 1
    assert sum(int(tensors) for _, _, tensors, *_ in bars.rows) == len(result.weights)
    ups = next(row for row in bars.rows if row[0] == "mlp_block.up_proj")
    errors = [e.relative_error for e in result.weights if e.name.endswith("up_proj.weight")]
    rms = (sum(e * e for e in errors) / 3) ** 0.5
    assert ups[2:] == ("3", f"{rms:.3g}", f"{max(errors):.3g}")


def test_a_path_that_is_not_unicode_is_written(result, tmp_path):
    write_html([changed(result, {"artifact.path": "mod\udce8le"})], tmp_path / "r.html")
    assert "mod⟨U+DCE8⟩le" in (tmp_path / "r.html").read_text("utf-8")


@pytest.mark.parametrize(("scheme", "ground"), [("light", 0), ("dark", 1)])
def test_colours_have_enough_contrast(scheme, ground, alone):
    style = render_page([alone])
    colours = [dict(re.findall(r"--(\w+): (#[0-9a-f]+);", part)) for part in style.split("@media")]
    for name in ("ink", "soft", "good", "bad", "unsure", "twin", "original"):
        ratio = _contrast(colours[ground][name], colours[ground]["ground"])
        assert ratio >= 4.5, (scheme, name)


def _contrast(one: str, other: str) -> float:
    """Returns WCAG's ratio of two colours #rrggbb or #rgb."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        shares = [value / 255 for value in bytes.fromhex(digits)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
