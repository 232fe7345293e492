"""A streamed reply on a terminal: Markdown changes the style of its text, and not a character."""

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_FENCE, _CODE, _BOLD = "```", "cyan", "bold"
_MARKS = re.compile(r"(`+|\*\*)")
_HEADING = re.compile(r"#{1,6}")


class StyledReply:
    """Prints a reply as it arrives; lines break between words, as wide as the console.

    A word is printed when it is complete. Headings and `**bold**` text are bold, code is coloured.
    Without `styled`, pieces are printed as they are.
    """

    def __init__(self, console: Console, *, styled: bool = True) -> None:
        self._console, self._styled = console, styled
        self._rest = ""
        self._column = 0
        self._begins_line, self._is_heading, self._is_fenced = True, False, False
        self._inline = ""

    def add(self, piece: str) -> None:
        if not self._styled:
            self._console.file.write(piece)
            self._console.file.flush()
            self._column = not piece.endswith("\n")
            return
        *complete, self._rest = _words(self._rest + piece)
        for item in complete:
            self._print(item)

    def close(self) -> None:
        """Prints the last word, and ends the line."""
        self._print(self._rest)
        self._rest = ""
        if self._column:
            self._print("\n")

    def _print(self, item: str) -> None:
        if item == "\n":
            self._end_line()
        elif item.isspace() or not item:
            self._put(item, "")
        elif self._is_fenced or (item.startswith(_FENCE) and self._begins_line):
            if item.startswith(_FENCE) and self._begins_line:
                self._is_fenced = not self._is_fenced
            self._begins_line = False
            self._put(item, _CODE)  # the terminal alone breaks lines of code
        else:
            self._is_heading |= self._begins_line and _HEADING.fullmatch(item) is not None
            self._begins_line = False
            if self._column and self._column + cell_len(item) > self._console.width:
                self._put("\n", "")
                self._column = 0
            for text, style in self._spans(item):
                self._put(text, style)

    def _spans(self, item: str) -> Iterator[tuple[str, str]]:
        """Yields the texts of a word with their styles; a mark has the style of what it marks."""
        for text in filter(None, _MARKS.split(item)):
            kind = _BOLD if text == "**" else _CODE if text.startswith("`") else ""
            before = self._inline
            if kind and before in ("", kind):
                self._inline = "" if before else kind
            style = before or self._inline
            yield text, " ".join(filter(None, (style, _BOLD if self._is_heading else "")))

    def _end_line(self) -> None:
        self._put("\n", "")
        self._column, self._inline = 0, ""
        self._begins_line, self._is_heading = True, False

    def _put(self, text: str, style: str) -> None:
        self._console.print(Text(text, style), end="", soft_wrap=True)
        self._column += cell_len(text)


def _words(text: str) -> Iterator[str]:
    """Yields words, white space and wide characters, which lines break between, then a rest."""
    start = 0
    for position, character in enumerate(text):
        if character.isspace() or cell_len(character) > 1:
            if start < position:
                yield text[start:position]
            yield character
            start = position + 1
    yield text[start:]
