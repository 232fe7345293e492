"""Prints results to stdout; remarks go through `progress` to stderr."""

import json
import os
import shutil
import sys
import textwrap
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from rgexport.errors import printable

_LINES = "\n\t"
_COMMAND = ": rgexport "
_MARKS = "\u061c\u200e\u200f"


def print_result(text: str, *, end: str = "\n") -> None:
    """Prints a result; control characters of names in it are escaped."""
    print(printable(text, allowed=_LINES), end=end, flush=True)


def print_outcome(sentence: str, path: Path, *, as_json: bool, **facts: object) -> None:
    """Prints what a command wrote: in words, or as JSON with the path, its bytes and more facts."""
    if not as_json:
        return print_sentences(sentence)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return print_result(json.dumps({"path": str(path), "bytes": size, **facts}))


def print_sentences(text: str) -> None:
    """Prints a result in words, broken between them on a terminal."""
    print_result(wrapped(text, terminal_columns(sys.stdout)))


def terminal_columns(stream: TextIO) -> int | None:
    """Returns the width of the terminal that a stream writes to; None if it is no terminal."""
    if not stream.isatty():
        return None
    with suppress(OSError, ValueError):
        if "COLUMNS" not in os.environ:
            return os.get_terminal_size(stream.fileno()).columns
    return shutil.get_terminal_size().columns


def wrapped(text: str, columns: int | None) -> str:
    """Breaks lines between words; leaves a longer word, such as a path, whole.

    A command that ends a line is not broken, so that it can be copied; it gets a line of its own.
    """
    if columns is None:
        return text
    wrap = partial(textwrap.wrap, width=columns, break_long_words=False, break_on_hyphens=False)
    lines: list[str] = []
    for line in text.split("\n"):
        words, colon, command = line.partition(_COMMAND)
        if colon and len(line) > columns:
            lines += [*wrap(f"{words}:"), f"  {_COMMAND[2:]}{command}"]
        else:
            lines += wrap(line) or [""]
    return "\n".join(lines)


def print_reply(piece: str, stream: TextIO) -> None:
    """Prints a piece of a model's reply; escapes control characters on a terminal only."""
    stream.write(printable_reply(piece) if stream.isatty() else piece)
    stream.flush()


def printable_reply(piece: str) -> str:
    return printable(piece, allowed=_LINES + _MARKS)
