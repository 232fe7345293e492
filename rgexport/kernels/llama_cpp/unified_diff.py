"""Unified diffs, applied to text in memory.

`git apply` does this too, but a machine with a wheel's compiler need not have git, and in a folder
that lies inside another repository it skips every file and reports success. The libraries on PyPI
(patch-ng, whatthepatch) look for a hunk only at its original line, and write file after file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_HEADER = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class Mismatch(Exception):
    """A hunk whose lines are not in the text; the message says which, and where it should be."""


@dataclass(frozen=True)
class Hunk:
    """Lines to find and lines to put in their place, both without line ends.

    Attributes:
        line: index of the line at which `before` stood in the original.
        before: what is removed, and the context around it.
        after: what is added, and the same context.
    """

    line: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    def reversed(self) -> "Hunk":
        """The hunk that undoes this one."""
        return Hunk(self.line, self.after, self.before)


def parse(diff: str) -> dict[str, tuple[Hunk, ...]]:
    """Reads a diff of `a/PATH` against `b/PATH`, as git writes it, of files that exist in both."""
    files: dict[str, tuple[Hunk, ...]] = {}
    for section in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        path, _, body = section.partition("\n")
        starts = [match.start() for match in re.finditer(r"^@@ ", body, re.MULTILINE)]
        pieces = [body[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        files[path.strip()] = tuple(map(_parse_hunk, pieces))
    return files


def _parse_hunk(text: str) -> Hunk:
    header, *lines = text.rstrip("\n").split("\n")
    match = _HEADER.match(header)
    if not match:
        raise ValueError(f"not the head of a hunk: {header}")
    lines = lines[: next((i for i, line in enumerate(lines) if line.startswith("diff ")), None)]
    before = tuple(line[1:] for line in lines if line[:1] != "+")
    after = tuple(line[1:] for line in lines if line[:1] != "-")
    if (len(before), len(after)) != (int(match[2] or 1), int(match[3] or 1)):
        raise ValueError(f"not as many lines as its head says: {header}")
    return Hunk(int(match[1]) - 1, before, after)


def apply(hunks: Sequence[Hunk], text: str) -> str:
    """Applies the hunks of one file wherever their lines have moved to, in order.

    A file with Windows line ends keeps them.

    Raises:
        Mismatch: the lines of a hunk are not in the text.
    """
    end = "\r" if "\r\n" in text else ""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    first, moved = 0, 0
    for number, hunk in enumerate(hunks, 1):
        found = _find(hunk.before, lines, first, hunk.line + moved)
        if found is None:
            raise Mismatch(f"hunk {number} of {len(hunks)}, near line {hunk.line + moved + 1}")
        lines[found : found + len(hunk.before)] = hunk.after
        first = found + len(hunk.after)
        moved = found - hunk.line + len(hunk.after) - len(hunk.before)
    return "\n".join(line + end for line in lines[:-1]) + "\n" * (len(lines) > 1) + lines[-1]


def _find(wanted: Sequence[str], lines: Sequence[str], first: int, expected: int) -> int | None:
    """The place nearest to `expected`, from `first` on, where `wanted` stands."""
    places = range(first, len(lines) - len(wanted) + 1)
    by_distance = sorted(places, key=lambda place: abs(place - expected))
    return next((p for p in by_distance if list(lines[p : p + len(wanted)]) == [*wanted]), None)
