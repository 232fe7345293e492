import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rgexport.validate.page import breakable, piece, render_page, role_errors, visible, write_html
from rgexport.validate.parity import compare
from rgexport.validate.positions import Choice
from rgexport.validate.result import Result
from tests.validate.test_result import with_nan

VOID = {"meta", "link", "wbr", "path", "rect", "circle"}
HOSTILE = """</script><script>alert(1)</script>"><img src=x onerror='alert(2)'>{{ 7*7 }}&amp;"""


class Page(HTMLParser):
    """Reads a page as a tree that must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.paths: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.paths.append((*self.open, tag))
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
def result(clean: Callable[[str], Path], checkpoint: Path) -> Result:
    return compare(clean("int4"), model=str(checkpoint), max_tokens=60)


@pytest.fixture(scope="module")
def alone(clean: Callable[[str], Path]) -> Result:
    return compare(clean("fp32"), max_tokens=20)


@pytest.fixture(scope="module", params=["one", "failed", "alone", "several"])
def page(request: pytest.FixtureRequest, result: Result, alone: Result) -> Page:
    results = {
        "one": [result],
        "failed": [with_nan(result)],
        "alone": [alone],
        "several": [result, alone, with_nan(result)],
    }
    return Page(render_page(results[request.param]))


def hostile(result: Result) -> Result:
    """Markup in all that comes from outside."""
    assert result.original is not None
    choice = Choice(token=3, probability=0.5, text=HOSTILE)
    place = dataclasses.replace(
        result.original.worst[0],
        context=HOSTILE,
        next_text=HOSTILE,
        reference=[choice],
        candidate=[choice],
    )
    return dataclasses.replace(
        result,
        artifact=dataclasses.replace(
            result.artifact, name=HOSTILE, path=HOSTILE, files={HOSTILE: "0" * 64}
        ),
        source=dataclasses.replace(
            result.source, path=HOSTILE, config_differences=(f"window: {HOSTILE}",)
        ),
        text=dataclasses.replace(result.text, name=HOSTILE),
        original=dataclasses.replace(result.original, worst=[place]),
        checks=[dataclasses.replace(result.checks[0], name=HOSTILE, reason=HOSTILE)],
        environment={**result.environment, "cpu": HOSTILE},
    )


def test_the_page_needs_nothing_else(page: Page) -> None:
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags.keys() & {"script", "img", "iframe", "object", "form", "base", "image", "use"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag, value) == ("link", "data:,")
    policies = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    style = page.texts[page.texts.index(next(t for t in page.texts if ":root" in t))]
    assert "url(" not in style and "@import" not in style


def test_the_page_is_for_every_screen(page: Page) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named(
        "meta"
    )
    style = next(text for text in page.texts if ":root" in text)
    assert "prefers-color-scheme: dark" in style and "max-width: 40rem" in style


def test_what_cannot_be_seen_is_told(page: Page) -> None:
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


def test_headings_begin_with_one_and_skip_no_level(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_the_verdict_comes_first(result: Result, alone: Result) -> None:
    count = len(result.checks)
    text = Page(render_page([result])).text
    body = text[text.index("}") :]
    assert 0 < body.index("PASS") < body.index(f"It computes what it should: all {count} checks")
    assert body.index("Compression cost") < body.index("What was compared")
    failed = Page(render_page([with_nan(result)])).text
    assert f"1 of {count} checks failed" in failed
    assert "twin.logits is nan, limit" in failed
    assert "the original was not given (-m)" in Page(render_page([alone])).text


def test_the_numbers_are_those_of_the_result(result: Result) -> None:
    assert result.original is not None
    text = Page(render_page([result])).text
    assert f"KL mean (nats) {result.twin.kl.mean:.3g} ±" in text
    for check in result.checks:
        assert f"{check.name} {check.value:.3g} {check.limit:.3g} passed" in text
    for place in result.original.worst:
        assert f"Position {place.position} KL {place.kl:.3g} nats" in text
        for choice in place.reference + place.candidate:
            assert f"#{choice.token} {100 * choice.probability:.2f} %" in text
    for digest in result.artifact.files.values():
        assert digest in text
    for value in result.environment.values():
        assert str(value) in text


def test_the_charts_show_both_sides(result: Result, alone: Result) -> None:
    lines = [c["class"] for c in Page(render_page([result])).named("path") if "class" in c]
    assert lines.count("line original") == lines.count("line twin") == 2
    assert "line original" not in [c.get("class") for c in Page(render_page([alone])).named("path")]
    dots = Page(render_page([result])).named("circle")
    assert len(dots) == 2 * 3, "states and weights of three layers"


def test_what_is_not_finite_is_a_gap_and_is_told(result: Result) -> None:
    blocks = [dataclasses.replace(b, kl_mean=math.nan) for b in result.twin.blocks[5:7]]
    blocks = [*result.twin.blocks[:5], *blocks, *result.twin.blocks[7:]]
    broken = dataclasses.replace(result, twin=dataclasses.replace(result.twin, blocks=blocks))
    page = Page(render_page([broken]))
    assert "2 of 60 not finite" in page.text
    (line,) = [p["d"] for p in page.named("path") if p.get("class") == "line twin"][:1]
    assert line is not None and line.count("M") == 2 and "nan" not in line


def test_markup_from_outside_stays_text(result: Result) -> None:
    ordinary, spoiled = (Page(render_page([r])) for r in (result, hostile(result)))
    tags = [Counter(tag for tag, _ in page.elements) for page in (ordinary, spoiled)]
    assert tags[1].keys() <= tags[0].keys() | {"wbr"}
    assert not tags[1].keys() & {"script", "img"}
    assert spoiled.text.count("onerror='alert(2)'>{{") >= 10
    assert "49" not in re.findall(r"onerror='alert\(2\)'>(\S+)", spoiled.text)
    assert len(Page(render_page([hostile(result)] * 2)).named("article")) == 2


def test_a_tokenizers_hostile_pieces(result: Result) -> None:
    shown = render_page([hostile(result)])
    assert "<script" not in shown and "&lt;/script&gt;&lt;script&gt;" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a↵\nb"),
        ("\0\x1b[31m", "␀␛[31m"),
        ("\u202egnp.exe", "⟨U+202E⟩gnp.exe"),
        ("\ud800", "⟨U+D800⟩"),
        ("👩\u200d🚀 é", "👩\u200d🚀 é"),
        ("\x7f\x85", "␡⟨U+0085⟩"),
    ],
)
def test_what_is_invisible_gets_a_mark(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_pieces_are_one_line_and_show_their_spaces() -> None:
    assert piece(" the") == "␣the"
    assert piece("\n\n\t") == "↵↵⇥"
    assert piece("") == "∅"


def test_long_names_may_be_broken() -> None:
    assert str(breakable("a.b_c<i>")) == "a.<wbr>b_<wbr>c&lt;i&gt;"
    assert str(breakable("/d/e")) == "/<wbr>d/<wbr>e"


def test_weights_by_role(result: Result) -> None:
    assert result.weights is not None
    roles = role_errors(result.weights)
    assert sum(role.tensors for role in roles) == len(result.weights)
    ups = next(role for role in roles if role.role == "mlp_block.up_proj")
    errors = [e.relative_error for e in result.weights if e.name.endswith("up_proj.weight")]
    assert ups.tensors == 3 and ups.worst == max(errors)
    assert ups.rms == pytest.approx((sum(e * e for e in errors) / 3) ** 0.5)
    assert roles[0].share == 1 and roles[0].rms == max(role.rms for role in roles)


def test_a_path_that_is_no_text_is_written(result: Result, tmp_path: Path) -> None:
    odd: dict[str, Any] = {"path": "mod\udce8le"}
    renamed = dataclasses.replace(result, artifact=dataclasses.replace(result.artifact, **odd))
    write_html([renamed], tmp_path / "r.html")
    assert "mod⟨U+DCE8⟩le" in (tmp_path / "r.html").read_text("utf-8")
