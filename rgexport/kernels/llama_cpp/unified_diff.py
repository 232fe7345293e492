"""Unified diffs, applied to text in memory.

`git apply` does this too, but a machine with a wheel's compiler need not have git, and in a folder
inside another repository it skips every file and reports success. The libraries on PyPI (patch-ng,
whatthepatch) look for a hunk only at its original line, and write file after file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class Hunk:
    """Whole lines to find, with the line end before them, and what replaces them."""

    before: str
    after: str


def parse(diff: str) -> dict[str, tuple[Hunk, ...]]:
    """Reads a diff as git writes it, of files that exist already: path → hunks."""
    parts = re.split(r"^\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    return {
        path: tuple(map(_parse_hunk, re.split(r"^@@ .*\n", body, flags=re.MULTILINE)[1:]))
        for path, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _parse_hunk(body: str) -> Hunk:
    lines = list(takewhile(lambda line: line.startswith((" ", "+", "-")), body.split("\n")))
    before, after = (
        "\n" + "".join(f"{line[1:]}\n" for line in lines if line[0] != sign) for sign in "+-"
    )
    return Hunk(before, after)


def apply(hunks: Sequence[Hunk], text: str) -> str | None:
    """A file with all hunks applied, wherever their lines are now; None if they do not fit.

    They fit if each one's lines are there once. A file that has all of them already is returned as
    it is. Windows line ends stay.
    """
    changed = "\n" + text.replace("\r\n", "\n")
    if all(changed.count(hunk.after) == 1 for hunk in hunks):
        return text
    for hunk in hunks:
        if changed.count(hunk.before) != 1:
            return None
        changed = changed.replace(hunk.before, hunk.after)
    return changed[1:].replace("\n", "\r\n" if "\r\n" in text else "\n")
