"""A streamed reply on a terminal: Markdown changes the style of its text, and not a character."""

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments

_CODE, _BOLD = "cyan", "bold"
_MARKS = re.compile(r"(`+|\*\*)")
_HEADING, _FENCE = re.compile(r"#{1,6}"), re.compile(r"```[^`]*")
_WIDE = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff"
    "\ufe30-\ufe6f\uff00-\uff60\U0001f000-\U0003ffff"
)
_ITEMS = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")
"""What lines break between: line ends, white space, wide characters, words."""
_IS_WIDE = re.compile(f"[{_WIDE}]")


class StyledReply:
    """Prints a reply as it arrives; lines break between words, as wide as the console.

    A word is printed when it is complete. Headings and `**bold**` text are bold, code is coloured.
    Without `styled`, pieces are printed as they are.
    """

    def __init__(self, console: Console, *, styled: bool = True) -> None:
        self._console, self._styled = console, styled
        self._space, self._word, self._continues = "", "", False
        self._column = 0
        self._begins_line, self._is_heading, self._is_fenced = True, False, False
        self._inline = ""

    def add(self, piece: str) -> None:
        if not self._styled:
            self._console.file.write(piece)
            self._console.file.flush()
            self._column = not piece.endswith("\n")
            return
        for item in _ITEMS.findall(piece):
            if item == "\n":
                self._end_line()
            elif item.isspace():
                self._end_word()
                self._space += item
            elif _IS_WIDE.match(item):
                self._end_word()
                self._print(item)
            else:
                self._word += item
                if len(self._word) > self._console.width:  # no line holds it
                    self._end_word()
                    self._continues = True

    def close(self) -> None:
        """Prints the last word, and ends the line."""
        self._end_word()
        if self._column:
            self._end_line()

    def _end_word(self) -> None:
        if self._word:
            self._print(self._word)
        self._word, self._continues = "", False

    def _print(self, item: str) -> None:
        is_fence = self._begins_line and _FENCE.fullmatch(item) is not None
        self._is_fenced ^= is_fence
        is_code = self._is_fenced or is_fence
        self._is_heading |= self._begins_line and _HEADING.fullmatch(item) is not None
        self._begins_line = False
        needed = cell_len(self._space) + cell_len(item)
        # The terminal alone breaks lines of code, and words that no line holds.
        is_whole = not (is_code or self._continues)
        if self._column and self._column + needed > self._console.width and is_whole:
            self._put("\n", "")
            self._column, self._space = 0, ""
        self._put(self._space, "")
        self._space = ""
        for text, style in [(item, _CODE)] if is_code else self._spans(item):
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
        self._end_word()
        self._put("\n", "")
        self._column, self._space, self._inline = 0, "", ""
        self._begins_line, self._is_heading = True, False

    def _put(self, text: str, style: str) -> None:
        segment = Segment(text, self._console.get_style(style or "none"))
        self._console.print(Segments([segment]), soft_wrap=True)
        for part in text.split("\t")[:-1]:
            self._column += cell_len(part)
            self._column += 8 - self._column % 8  # to the next tab stop
        self._column += cell_len(text.rpartition("\t")[2])
