"""What is shown of a result: the page and its charts, the terminal, and JSON."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.result_schema import as_text, result_schema
from rgexport import progress
from rgexport.errors import RequestError
from rgexport.files.targets import write_text
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.reporting import chart
from rgexport.reporting.chart import BOTTOM, LEFT, RIGHT, TOP, Chart, Series
from rgexport.reporting.page import breakable, visible
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.continuations import Continuation
from rgexport.validate.metrics import worst
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import read_reference
from rgexport.validate.report.page import piece, render_page
from rgexport.validate.report.sentences import MOST_NAMED
from rgexport.validate.report.terminal import render
from rgexport.validate.result import ValidationResult, as_json, require_writable
from rgexport.validate.run import validate_artifact
from tests.validate.report import changed_results as changes

PUBLISHED = Path(__file__).parents[3] / "docs" / "validate.schema.json"
VOID = {"meta", "link", "wbr", "path", "rect", "circle"}


class Page(HTMLParser):
    """Reads a page as a tree that must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "dd", "li", "p"):
            self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All text, runs of spaces as one."""
        return " ".join("".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def result(clean, checkpoint, tmp_path_factory) -> ValidationResult:
    target = tmp_path_factory.mktemp("report") / "r"
    reference = read_reference(capture(open_checkpoint(checkpoint), target, device="cpu"))
    asked = {"max_tokens": 70, "bisect": True, "reference": reference}
    measured = validate_artifact(clean("int4"), ValidationRequest(model=str(checkpoint), **asked))
    suspects = [Suspect(layer=1, site="layers.1.temporal_block.rg_lru", evidence="for the test")]
    return dataclasses.replace(measured, suspects=suspects)


@pytest.fixture(scope="module")
def alone(clean) -> ValidationResult:
    return validate_artifact(clean("fp32"), ValidationRequest(max_tokens=20))


@pytest.fixture(scope="module", params=["one", "several"])
def page(request, result, alone) -> Page:
    made = changes.with_nan, changes.of_a_file_alone, changes.ambiguous
    several = [result, alone, *(change(result) for change in made)]
    one = [changes.with_site_beyond(result)]
    return Page(render_page(one if request.param == "one" else several))


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


def test_the_verdict_comes_first(result, alone):
    count = len(result.checks)
    text = Page(render_page([result])).text
    body = text[text.index("}") :]
    assert 0 < body.index("PASS") < body.index("Export correct, every check passed.")
    failed = Page(render_page([changes.with_nan(result)])).text
    assert f"1 of {count} checks failed" in failed and "dequantized.logits is nan, limit" in failed
    assert "not given (-m), so the cost is not measured" in Page(render_page([alone])).text
    failures = [dataclasses.replace(check, value=math.nan) for check in [*result.checks] * 2]
    many = dataclasses.replace(result, checks=[*changes.ambiguous(result).checks[:1], *failures])
    more = f"and {2 * count + 1 - MOST_NAMED} more"
    assert more in Page(render_page([many])).text and f"… {more}\n" in render([many])
    assert render([many]).count("FAILED  ") == MOST_NAMED and "AMBIGUOUS" not in render([many])
    unsure = Page(render_page([changes.ambiguous(result)]))
    assert f"1 of {count} checks cannot be decided" in unsure.text
    assert "dequantized.logits is 0.25 ± 0.04, limit 0.27" in unsure.text
    classes = [attributes.get("class") for _, attributes in unsure.elements]
    assert "verdict ambiguous" in classes and "unsure" in classes


def test_both_texts_stand_side_by_side(result):
    texts = {"reference": "the sea rose", "artifact": "the hill was green", "shared": "the "}
    texts |= {"reference_next": "sea", "artifact_next": "hill"}
    written = Continuation(name="prose", prompt=changes.HOSTILE, tokens=16, common=1, **texts)
    both = dataclasses.replace(result, continuations=[written])
    shown = render_page([both])
    assert "the <mark>sea</mark> rose" in shown and "the <mark>hill</mark> was green" in shown
    assert "<script" not in shown
    lines = render([both]).splitlines()
    index = next(i for i, line in enumerate(lines) if "1 of 16 tokens are the same" in line)
    assert lines[index + 1].split() == ["original", "the", "[sea]", "rose"]
    assert lines[index + 2].split() == ["artifact", "the", "[hill]", "was", "green"]


def test_the_numbers_are_those_of_the_result(result):
    text = Page(render_page([result])).text
    tiles = text[: text.index("How to read this")]
    assert f"KL {result.original.kl.mean:.3g} ± " in tiles
    assert f"top-1 agreement {100 * result.original.agreement.top1:.2f} %" in tiles
    assert f"Checks and their limits {len(result.checks)} checks " in text
    for check in result.checks:
        margin = f" ± {check.margin:.1g}" if check.margin else ""
        assert f"{check.name} {check.value:.3g}{margin} {check.limit:.3g} PASS" in text
    for place in result.original.worst:
        assert f"Position {place.position} KL {place.kl:.3g} nats" in text
        for choice in place.reference + place.candidate:
            assert f"#{choice.token} {100 * choice.probability:.2f} %" in text
    text = text[text.index("Layers by what their quantization costs") :]
    costs = sorted(result.layers, key=lambda cost: -cost.kl)
    places = [text.index(f"{cost.part} {cost.kl:.3g} ±") for cost in costs]
    assert places == sorted(places)


def test_a_reference_file_is_shown_alone_and_beside_the_original(result, monkeypatch):
    text = Page(render_page([changes.of_a_file_alone(result)])).text
    assert "to the original in the reference file" in text and "Against the reference" in text
    for prompt in result.reference.prompts:
        assert f"{prompt.name} {prompt.tokens:,} {prompt.positions:,} {prompt.kl:.3g}" in text
    monkeypatch.setattr(progress, "verbose", True)
    drift, said = result.reference.drift[0], render([result])
    assert re.search(rf"{drift.position} tokens +{worst(drift.states):.3g}\n", said)


def test_the_first_op_beyond_its_limit_is_named_at_the_top(result):
    page = Page(render_page([changes.with_site_beyond(result)]))
    head = page.text[: page.text.index("What was compared")]
    assert "The first op beyond its limit is layers.1.temporal_block.rg_lru (rg_lru_scan)" in head
    assert [span.get("class") for span in page.named("span")].count("bar beyond") == 1
    assert "beyond its limit is" not in Page(render_page([result])).text


def test_markup_from_outside_stays_text(result):
    shown = render_page([changes.hostile(result)])
    ordinary, spoiled = Page(render_page([result])), Page(shown)
    tags = [Counter(tag for tag, _ in page.elements) for page in (ordinary, spoiled)]
    assert tags[1].keys() <= tags[0].keys() | {"wbr"}
    assert not tags[1].keys() & {"script", "img"}
    assert spoiled.text.count("onerror='alert(2)'>{{") >= 20
    assert "49" not in re.findall(r"onerror='alert\(2\)'>(\S+)", spoiled.text)
    assert len(Page(render_page([changes.hostile(result)] * 2)).named("article")) == 2
    assert "<script" not in shown and "&lt;/script&gt;&lt;script&gt;" in shown


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (visible("a\nb\0\x1b[31m\x7f\x85"), "a↵\nb␀␛[31m␡⟨U+0085⟩"),
        (visible("\u202egnp.exe\ud800"), "⟨U+202E⟩gnp.exe⟨U+D800⟩"),
        (piece(" the\n\t"), "␣the↵⇥"),
        (breakable("layers.10.a_c<i>"), "layers.<wbr>10.<wbr>a_<wbr>c&lt;i&gt;"),
    ],
)
def test_names_and_pieces_are_readable(shown, expected):
    assert str(shown) == expected


NUMBERS = st.just(0.0) | st.floats(1e-15, 1e6) | st.sampled_from([math.nan, math.inf])


@given(st.lists(NUMBERS, max_size=20))
def test_finite_values_and_ticks_lie_in_the_picture(numbers):
    for axis in (chart.logarithmic_axis(numbers), chart.linear_axis(numbers)):
        line = Series("twin", "twin", list(enumerate(numbers)), dots=True)
        words = {"title": "t", "summary": "", "labels": ("x", "y"), "column": "x"}
        drawn = Chart(series=(line,), y=axis, **words)
        dots = [point for point in drawn.pixels(line) if point]
        assert len(dots) == sum(map(math.isfinite, numbers))
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in dots)
        assert all(LEFT <= drawn.x(x) <= RIGHT for x, _ in drawn.x.ticks)
        assert 2 <= len(axis.ticks) <= 6
        assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)


def test_error_bars_lie_in_the_picture_and_in_the_numbers():
    line = Series("twin", "twin", [(1, 2.0)], intervals=[(1, 0.5, 4.0)])
    axis = chart.linear_axis(chart.y_values([line]))
    drawn = Chart(title="t", summary="", labels=("x", "y"), series=[line], y=axis)
    assert axis.low <= 0.5 and axis.high >= 4 and drawn.rows == [["1", "2 (0.5 to 4)"]]


def test_json_is_strict_and_described_by_the_published_schema(result, alone, tmp_path):
    assert PUBLISHED.read_text("utf-8") == as_text() + "\n"
    schema = json.loads(PUBLISHED.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def refuse(word: str) -> None:
        raise ValueError(word)

    by_bytes = changes.changed(alone, {"artifact.path": os.fsdecode(b"mod\xe8le")})  # no Unicode
    written = []
    for results in ([result], [changes.with_nan(result)], [by_bytes], [result, alone]):
        write_text(as_json(results), tmp_path / "r.json")
        text = (tmp_path / "r.json").read_text("utf-8")
        written.append(json.loads(text, parse_constant=refuse))
        validator.validate(written[-1])
    whole, broken, named, _ = written
    assert not validator.is_valid(whole | {"verdict": "MAYBE"})
    definitions = result_schema()["$defs"]
    assert whole.keys() == definitions["ValidationResult"]["properties"].keys()
    place = whole["original"]["worst"][0]
    assert place.keys() == definitions["WorstPosition"]["properties"].keys()
    assert all(definition["description"] for definition in definitions.values())
    assert named["artifact"]["path"] == by_bytes.artifact.path
    write_text(render_page([by_bytes]), tmp_path / "r.html")
    assert "mod⟨U+DCE8⟩le" in (tmp_path / "r.html").read_text("utf-8")
    assert broken["verdict"] == "FAIL" and broken["dequantized"]["logits"]["max"] is None
    check = broken["checks"][0]
    assert (check["name"], check["value"], check["passed"]) == ("dequantized.logits", None, False)


def test_the_report_fits_a_screen(result, monkeypatch):
    short = changes.without_bisect(result)
    lines = render([short]).splitlines()
    assert len(lines) <= 24
    assert lines[0].startswith("PASS  ") and lines[0].endswith("every check passed")
    assert lines[-1] == "All numbers: -v, or --html FILE for a page."
    first, *_, last = lines = render([changes.with_nan(short)]).splitlines()
    assert first.startswith("FAIL  ") and f"1 of {len(result.checks)} checks failed" in first
    assert any(line.startswith("FAILED  dequantized.logits is nan") for line in lines)
    assert f"rgexport validate {result.artifact.path} --bisect" in last and len(lines) <= 22

    monkeypatch.setattr(progress, "verbose", True)
    text = render([short])
    assert len(text.splitlines()) > 40 and "\x1b" not in text
    assert max(len(line) for line in text.splitlines() if "   " in line) <= 100
    assert "KL 99th percentile" in text and "worst state" in text and "projection" in text
    unknown = {"source.found": False, "original": None, "weights": None}
    text = render([changes.changed(short, unknown)])
    assert "not given (-m), so the cost is not measured" in text and "projection" not in text


def test_size_and_cost_of_several_have_columns(clean, result, alone):
    size = sum(file.stat().st_size for file in clean("int4").iterdir())
    assert result.artifact.bytes == size and alone.artifact.bits_per_weight == 32
    assert 4.5 < result.artifact.matrix_bits_per_weight < result.artifact.bits_per_weight < 10
    text = render([changes.changed(result, {"original": None}), alone])
    assert f"{result.reference.kl.mean:.3g} ± " in text


def test_the_closest_of_several_is_named_and_how_sure_that_is(result, monkeypatch):
    smaller = {"artifact.path": "best", "original.kl.mean": result.original.kl.mean / 2}
    for error, words in ((1e-9, "certainly has more KL"), (1.0, "may be as close, within the")):
        best = changes.changed(result, smaller | {"original.kl.standard_error": error})
        line = f"Closest to the original: best; the next, {result.artifact.path}, {words}"
        other = changes.changed(result, {"original.kl.standard_error": error})
        assert line in render([other, best]) and line in Page(render_page([other, best])).text
    assert "Closest to" not in render([changes.with_nan(best), result])
    monkeypatch.setattr(progress, "verbose", True)
    assert render([best, result]).count("Consistency") == 2


def test_a_report_damages_no_artifact_and_names_a_full_disk(clean, tmp_path, result):
    require_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    with pytest.raises(RequestError, match="it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(RequestError, match="cannot write /dev/full: No space left"):
        write_text(as_json([result]), Path("/dev/full"))
    (tmp_path / "link").symlink_to(clean("int4"))
    for file in (clean("int4") / "rgexport.json", tmp_path / "link" / "new.json"):
        with pytest.raises(RequestError, match="it lies in an artifact; choose another place"):
            require_writable(file)
