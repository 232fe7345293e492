"""HTML pages that need neither network nor script: the templates, and how text is shown in them.

Names and texts may hold anything: the templates escape all they show, and the page's policy
forbids it to load or run whatever might slip through.
"""

import re
import unicodedata
from typing import TYPE_CHECKING, Any

from rgexport._version import __version__
from rgexport.errors import JOINERS
from rgexport.reporting import chart

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_MARKS = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", "\x7f": "␡"}
_SHORT = 12  # characters of a name that is never broken


def render_page(package: str, template: str, **variables: Any) -> str:
    return page_environment(package).get_template(template).render(**variables)


def page_environment(package: str) -> "Environment":
    """Returns an environment with the templates of a package and of `reporting`."""
    import jinja2

    packages = (f"rgexport.{package}", "rgexport.reporting")
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"visible": visible, "breakable": breakable}
    environment.globals |= {"plot": chart, "rgexport": __version__}
    return environment


def breakable(name: str) -> "Markup":
    """Returns a dotted name or a path that may be broken after `.`, `_` and `/`."""
    from markupsafe import Markup, escape

    text = visible(name)
    pieces = re.split(r"(?<=[._/])", text) if len(text) > _SHORT else [text]
    return Markup("<wbr>").join(map(escape, pieces))


def visible(text: str) -> str:
    """Returns text with marks in place of control characters, format characters, line breaks."""
    return "".join(_MARKS.get(character) or _visible(character) for character in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs") or character in JOINERS:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
