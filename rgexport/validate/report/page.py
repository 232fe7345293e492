"""The outcome of `validate` as one HTML page that needs nothing else, neither network nor script.

Names and texts may hold anything: the templates escape all they show, and the page's policy
forbids it to load or run whatever might slip through.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport.units import amount
from rgexport.validate.bisect.suspects import site_evidence
from rgexport.validate.checks import verdict
from rgexport.validate.quality import GRADES
from rgexport.validate.report import chart
from rgexport.validate.report.charts import cost_charts
from rgexport.validate.report.page_view import view
from rgexport.validate.report.result_tables import overview
from rgexport.validate.report.words import (
    check_words,
    counted_verdicts,
    number,
    percent,
    value_words,
    verdict_words,
)
from rgexport.validate.result import Result, write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_SHOWN = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", "\x7f": "␡"}
_JOINERS = "\u200c\u200d"
"""Invisible characters that emoji and many scripts are written with."""
_SHORT = 12


def write_html(results: Sequence[Result], path: Path) -> None:
    """Writes the page of one artifact or several.

    Raises:
        RequestError: the file cannot be written.
    """
    write_text(render_page(results), path)


def render_page(results: Sequence[Result]) -> str:
    """The page: the verdict first; of several artifacts their table next."""
    environment = templates_of()
    filters = amount, breakable, check_words, number, percent, piece, site_evidence, value_words
    environment.filters |= {f.__name__: f for f in filters}
    environment.globals["grades"] = GRADES
    return environment.get_template("page.html.j2").render(
        views=[view(f"a{index}", result) for index, result in enumerate(results, 1)],
        verdict=verdict(check for result in results for check in result.checks),
        badge=verdict_words(*results),
        counts=counted_verdicts(results),
        overview=overview(results),
        costs=list(cost_charts(results)),
        environment=results[0].environment,
        rgexport=results[0].environment["rgexport"],
    )


def templates_of(*packages: str) -> "Environment":
    """The templates of packages of `rgexport`, which may use those of reports: charts, style."""
    import jinja2

    places = (f"rgexport.{package}" for package in (*packages, "validate.report"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(place) for place in places]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = visible
    environment.globals["plot"] = chart
    return environment


def piece(text: str) -> str:
    """The text of a token, on one line, with its spaces visible."""
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "") or "∅"


def breakable(name: str) -> "Markup":
    """A dotted name, or a path, that may be broken where its parts end, unless it is short."""
    from markupsafe import Markup, escape

    shown = visible(name)
    parts = re.split(r"(?<=[._/])", shown) if len(shown) > _SHORT else [shown]
    return Markup("<wbr>").join(map(escape, parts))


def visible(text: str) -> str:
    """Text with marks for what cannot be seen: control and format characters, line breaks."""
    return "".join(_SHOWN.get(c) or (_mark(c) if _is_invisible(c) else c) for c in text)


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS


def _mark(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
