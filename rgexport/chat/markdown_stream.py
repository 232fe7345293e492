"""Streamed Markdown on a terminal: finished blocks are printed, the last one is redrawn."""

import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

_FENCE = "```"
_REDRAW_SECONDS = 0.08


class MarkdownStream:
    def __init__(self, console: Console) -> None:
        self._console, self._text, self._drawn = console, "", 0.0
        self._live = self._new_live()

    def add(self, piece: str) -> None:
        self._text += piece
        if end := _end_of_blocks(self._text):
            # Live output is cut at the height of the screen, so finished blocks leave it.
            self._live.stop()
            self._console.print(Markdown(self._text[:end]))
            self._console.print()
            self._text = self._text[end:]
            self._live = self._new_live()
            self._live.start()
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._live.update(Markdown(self._text), refresh=True)
            self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()
        if self._text.strip():
            self._console.print(Markdown(self._text))

    def _new_live(self) -> Live:
        return Live(console=self._console, auto_refresh=False, transient=True)


def _end_of_blocks(text: str) -> int:
    """Returns the position after the last blank line outside of code blocks; 0 if there is none."""
    position = text.rfind("\n\n")
    while position > 0 and text.count(_FENCE, 0, position) % 2:
        position = text.rfind("\n\n", 0, position)
    return position + 2 if position > 0 else 0
