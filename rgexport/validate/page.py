"""The outcome of `validate` as one HTML page that needs nothing else, neither network nor script.

Names and texts may hold anything: the templates escape all they show, and the page forbids itself
to load or run whatever might slip through.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.progress import amount
from rgexport.validate import chart
from rgexport.validate.file_report import file_rows
from rgexport.validate.measure import Comparison
from rgexport.validate.pictures import charts
from rgexport.validate.report import (
    OVERVIEW,
    SIDES,
    comparison_rows,
    number,
    overview_row,
    percent,
    source_words,
)
from rgexport.validate.result import Result, write_text
from rgexport.validate.weights import WeightError

if TYPE_CHECKING:
    from markupsafe import Markup

_SHOWN = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", "\x7f": "␡"}
_LAYER = re.compile(r"layers\.\d+\.")


def write_html(results: Sequence[Result], path: Path) -> None:
    """Writes the page of one artifact or several.

    Raises:
        RequestError: the file cannot be written.
    """
    write_text(render_page(results), path)


def render_page(results: Sequence[Result]) -> str:
    """The page: the verdict first, of several artifacts their table next."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rgexport.validate"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = {f.__name__: f for f in (number, percent, amount, visible, piece, breakable)}
    environment.filters |= shown
    failed = sum(not result.passed for result in results)
    return environment.get_template("page.html.j2").render(
        views=[View(f"a{index}", result) for index, result in enumerate(results, 1)],
        failed=failed,
        overview=(OVERVIEW, [overview_row(result) for result in results]),
        sides=SIDES,
        plot=chart,
        environment=results[0].environment,
        rgexport=results[0].environment["rgexport"],
    )


def piece(text: str) -> str:
    """The text of a token, on one line: its spaces count."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def breakable(name: str) -> "Markup":
    """A dotted name, or a path, that may be broken where its parts end."""
    from markupsafe import Markup, escape

    parts = re.split(r"(?<=[._/])", visible(name))
    return Markup("<wbr>").join(map(escape, parts))


def visible(text: str) -> str:
    """Text with marks for what cannot be seen: control and format characters, line breaks."""
    return "".join(_SHOWN.get(c) or (_mark(c) if _is_invisible(c) else c) for c in text)


def _is_invisible(character: str) -> bool:
    """All but the joiners that emoji and many scripts are written with."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"


def _mark(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


@dataclass(frozen=True)
class RoleError:
    """The tensors that play one role in all layers, and are stored in one way."""

    role: str
    scheme: str
    tensors: int
    rms: float
    worst: float
    share: float
    """Of the largest `rms` of all roles, in [0, 1]."""


def role_errors(weights: Sequence[WeightError]) -> list[RoleError]:
    """The weight table by role, the worst first."""
    groups: dict[tuple[str, str], list[WeightError]] = {}
    for error in weights:
        role = _LAYER.sub("", error.name).removesuffix(".weight")
        groups.setdefault((role, error.scheme), []).append(error)
    rms = {
        key: (sum(e.relative_error**2 for e in group) / len(group)) ** 0.5
        for key, group in groups.items()
    }
    largest = max(rms.values(), default=0) or 1
    found = [
        RoleError(
            *key,
            tensors=len(group),
            rms=rms[key],
            worst=max(e.relative_error for e in group),
            share=rms[key] / largest,
        )
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda role: -role.rms)


@dataclass(frozen=True)
class View:
    """One artifact as the templates want it; `anchor` begins the ids of its elements."""

    anchor: str
    result: Result

    @property
    def verdict(self) -> str:
        """In words."""
        checks = self.result.checks
        failed = sum(not check.passed for check in checks)
        if not failed:
            return f"It computes what it should: all {len(checks)} checks passed."
        return f"{failed} of {len(checks)} checks failed."

    @property
    def cost(self) -> str:
        """What compression cost, in words."""
        c = self.result.original
        if c is None:
            return "What compression cost was not measured: the original was not given (-m)."
        return " ".join(_cost(c))

    @property
    def source(self) -> str:
        """The original, in words."""
        return source_words(self.result)

    @property
    def reference(self) -> str:
        """What the worst positions are the worst against."""
        return "twin" if self.result.original is None else "original"

    @property
    def comparison(self) -> Comparison:
        """With that."""
        return self.result.original or self.result.twin

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """All that was measured."""
        return list(comparison_rows(self.result))

    @property
    def file_rows(self) -> list[tuple[str, ...]]:
        """What a reference file told, if one was given."""
        found = self.result.reference
        return [] if found is None else list(file_rows(found))

    @property
    def charts(self) -> list[chart.Chart]:
        """All that can be drawn."""
        return list(charts(self.result))

    @property
    def roles(self) -> list[RoleError]:
        """The weight table by role, without what was stored as it was."""
        weights = self.result.weights or []
        return role_errors([error for error in weights if error.max_steps != 0])

    @property
    def exact_tensors(self) -> int:
        """How many were stored as they were."""
        return sum(error.max_steps == 0 for error in self.result.weights or [])


def _cost(c: Comparison) -> Iterator[str]:
    yield (
        f"Compression cost {number(c.kl.mean)} ± {c.kl.standard_error:.1g} nats of KL per token; "
        f"the first choice stayed the same at {percent(c.agreement.top1)} of the positions."
    )
    if c.likelihood is not None:
        before, after = c.likelihood.perplexity, c.likelihood.perplexity_candidate
        yield f"Perplexity went from {before:.4g} to {after:.4g}."
