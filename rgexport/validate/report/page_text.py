"""Text from outside as a page shows it: nothing in it is invisible, or too long to be broken."""

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

_SHOWN = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍", "\x7f": "␡"}
_SHORT = 12


def piece(text: str) -> str:
    """The text of a token, on one line: its spaces count."""
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
    """All but the joiners that emoji and many scripts are written with."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d"


def _mark(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
