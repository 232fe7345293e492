"""Markdown on a terminal while it is written: finished blocks stay, the last one is redrawn."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

_FENCE = "```"
_SECONDS = 0.08
"""Between two redrawings."""


class MarkdownStream:
    """Takes text piece by piece, within a `with` block."""

    def __init__(self, console: Console) -> None:
        """Writes to `console`."""
        self._console, self._text, self._drawn = console, "", 0.0
        self._live = self._new()

    def add(self, piece: str) -> None:
        """Takes the next piece."""
        self._text += piece
        if end := _finished(self._text):
            self._print(self._text[:end])
            self._text = self._text[end:]
        if time.monotonic() - self._drawn >= _SECONDS:
            self._live.update(Markdown(self._text), refresh=True)
            self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        """Begins to draw."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Writes the last block."""
        self._live.stop()
        if self._text.strip():
            self._console.print(Markdown(self._text))

    def _print(self, text: str) -> None:
        """Writes a block for good: what is alive is cut at the height of the screen."""
        self._live.stop()
        self._console.print(Markdown(text))
        self._console.print()
        self._live = self._new()
        self._live.start()

    def _new(self) -> Live:
        return Live(console=self._console, auto_refresh=False, transient=True)


def _finished(text: str) -> int:
    """Where the last block begins: after the last blank line that is in no block of code."""
    place = text.rfind("\n\n")
    while place > 0 and text.count(_FENCE, 0, place) % 2:
        place = text.rfind("\n\n", 0, place)
    return place + 2 if place > 0 else 0
