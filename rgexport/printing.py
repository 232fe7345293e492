"""Prints results to stdout; remarks go through `progress` to stderr."""

import sys
from typing import TextIO

from rgexport.errors import printable

_LINES = "\n\t"
_MARKS = "\u061c\u200e\u200f"


def print_result(text: str, *, end: str = "\n") -> None:
    """Prints a result; control characters of names in it are escaped."""
    print(printable(text, allowed=_LINES), end=end, flush=True)


def print_reply(piece: str, stream: TextIO | None = None) -> None:
    """Prints a piece of a model's reply; escapes control characters on a terminal only."""
    stream = stream or sys.stdout
    stream.write(printable_reply(piece) if stream.isatty() else piece)
    stream.flush()


def printable_reply(piece: str) -> str:
    return printable(piece, allowed=_LINES + _MARKS)
