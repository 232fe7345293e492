"""Sets of a tensor's rows as texts of ascending ranges, such as `0-255,300,412-500`."""

import functools
import re

import numpy as np

from rgexport.errors import RequestError

MAX_ROWS = 1 << 31
"""Rows that a tensor may have: their numbers are int32."""
_TEXT = re.compile(r"\d{1,10}(-\d{1,10})?(,\d{1,10}(-\d{1,10})?)*", re.ASCII)
_SHOWN = 60


@functools.lru_cache(maxsize=64)
def row_bounds(text: str) -> np.ndarray:
    """The ranges of a text: [ranges, 2] int64, the first row and the one after the last.

    Raises:
        RequestError: it is not what `rows_text` makes; so equal sets are equal texts.
    """
    bounds = _parsed(text) if _TEXT.fullmatch(text) else np.zeros((0, 2), np.int64)
    sound = len(bounds) and (bounds[:, 0] < bounds[:, 1]).all() and _text(bounds) == text
    if not sound or bounds[-1, 1] > MAX_ROWS:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise RequestError(
            f"a row group has rows {shown!r}; expected ascending ranges with gaps between them, "
            'such as "0-255,300,412-500"'
        )
    bounds.flags.writeable = False
    return bounds


def rows_text(rows: np.ndarray) -> str:
    """The text of ascending row numbers, of which there is at least one."""
    last = np.flatnonzero(np.diff(rows) != 1)
    starts, ends = rows[np.append(0, last + 1)], rows[np.append(last, len(rows) - 1)]
    return _text(np.stack([starts, ends + 1], 1).astype(np.int64))


def rows_of(bounds: np.ndarray) -> np.ndarray:
    """The row numbers in ranges, ascending, int32."""
    lengths = bounds[:, 1] - bounds[:, 0]
    before = np.cumsum(lengths) - lengths
    offsets = np.repeat(bounds[:, 0] - before, lengths)
    return (offsets + np.arange(lengths.sum())).astype(np.int32)


def count_rows(bounds: np.ndarray) -> int:
    """How many rows are in ranges."""
    return int((bounds[:, 1] - bounds[:, 0]).sum())


def _parsed(text: str) -> np.ndarray:
    ends = [range_.partition("-") for range_ in text.split(",")]
    return np.array([(int(first), int(last or first) + 1) for first, _, last in ends], np.int64)


def _text(bounds: np.ndarray) -> str:
    """The text of ranges, those that touch or overlap merged."""
    pairs: list[list[int]] = []
    for start, stop in bounds.tolist():
        if pairs and start <= pairs[-1][1]:
            pairs[-1][1] = max(pairs[-1][1], stop)
        else:
            pairs.append([start, stop])
    return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairs)
