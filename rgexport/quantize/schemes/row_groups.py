"""Row groups: rows of one matrix, such as `0-255,300,412-500`, that are stored in one scheme.

The *position* of a row is its number in all groups, one after another.
"""

import functools
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize.schemes.affine import Affine
from rgexport.quantize.schemes.base import FloatDtype, Scheme, Shape, Uniform
from rgexport.quantize.schemes.two_level import TwoLevel

MAX_GROUPS = 16
"""Row groups that a tensor may have: each is a product of its own."""
MAX_ROWS = 1 << 31
"""Rows that a tensor may have: their numbers are int32."""
_TEXT = re.compile(r"\d{1,10}(-\d{1,10})?(,\d{1,10}(-\d{1,10})?)*", re.ASCII)
_MAX_SHOWN = 60
_GROUPED: dict[str, type[Affine] | type[TwoLevel]] = {s.kind: s for s in (Affine, TwoLevel)}


@dataclass(frozen=True)
class RowGroup:
    """Rows of a matrix that are stored alike; `rows` is None for all that no other group has."""

    rows: str | None
    scheme: Affine | TwoLevel

    @property
    def label(self) -> str:
        if self.rows is None:
            return self.scheme.label
        count = count_rows(row_bounds(self.rows))
        return f"{self.scheme.label} ({count:,} row{'s' if count > 1 else ''})"

    @classmethod
    def from_dict(cls, values: Any) -> "RowGroup":
        if not isinstance(values, dict) or values.keys() != {"rows", "scheme"}:
            raise RequestError(f"a row group is {reprlib.repr(values)}; expected rows and scheme")
        rows, scheme = values["rows"], values["scheme"]
        if not isinstance(rows, str | None):
            raise RequestError(
                f"a row group has rows {reprlib.repr(rows)}; expected a text or null"
            )
        if rows is not None:
            row_bounds(rows)
        kind = scheme.get("kind") if isinstance(scheme, dict) else None
        if not isinstance(kind, str) or kind not in _GROUPED:
            raise RequestError(
                f"a row group is {reprlib.repr(scheme)}; expected kind {' or '.join(_GROUPED)}"
            )
        return cls(rows, _GROUPED[kind].from_dict(scheme))


@dataclass(frozen=True)
class Mixed(Scheme):
    """Row groups of a matrix, each stored as a matrix of its own; the last has all other rows."""

    groups: tuple[RowGroup, ...]
    kind: Literal["mixed"] = "mixed"

    @property
    def label(self) -> str:
        return " + ".join(group.label for group in self.groups)

    @property
    def uniform(self) -> tuple[Uniform, ...]:
        return tuple(group.scheme for group in self.groups)

    @property
    def has_row_groups(self) -> bool:
        """True: a mixed scheme has two groups or more."""
        return True

    def row_groups(self, rows: int) -> list[tuple[str, Uniform, np.ndarray | None]]:
        self.group_sizes(rows)
        members = zip(self.groups, _members(self, rows), strict=True)
        return [(group.label, group.scheme, ids) for group, ids in members]

    def group_sizes(self, rows: int) -> tuple[int, ...]:
        bounds = np.concatenate(self._bounds)
        bounds = bounds[np.argsort(bounds[:, 0], kind="stable")]
        if (shared := bounds[1:, 0] < bounds[:-1, 1]).any():
            row = bounds[1:][shared][0, 0]
            raise RequestError(f"row {row} is in two row groups; expected each row in one of them")
        if bounds[-1, 1] > rows:
            raise RequestError(
                f"a row group has row {bounds[-1, 1] - 1}; expected rows below {rows}"
            )
        sizes = [count_rows(group) for group in self._bounds]
        rest = rows - sum(sizes)
        if not rest:
            raise RequestError(
                f"the row groups name all {rows} rows; expected some left to the last group"
            )
        return (*sizes, rest)

    def positions(self, rows: int) -> np.ndarray | None:
        """Returns the position of each row, int32 [rows]; None if it is the row's number."""
        bounds = np.concatenate(self._bounds)
        if (bounds[:, 0] == np.append(0, bounds[:-1, 1])).all():
            return None
        positions = np.empty(rows, np.int32)
        self.group_sizes(rows)
        positions[np.concatenate(_members(self, rows))] = np.arange(rows, dtype=np.int32)
        return positions

    def index_bytes(self, rows: int) -> int:
        """Counts the texts, twice in a manifest, and the positions in a graph."""
        return 4 * rows + sum(2 * len(group.rows or "") for group in self.groups)

    @property
    def _bounds(self) -> list[np.ndarray]:
        return [row_bounds(group.rows) for group in self.groups if group.rows]

    def fitted(self, shape: Shape) -> "Mixed":
        return self._each(lambda scheme: scheme.fitted(shape))

    def least_padded(self, columns: int) -> "Mixed":
        return self._each(lambda scheme: scheme.least_padded(columns))

    def with_dtype(self, dtype: FloatDtype) -> "Mixed":
        return self._each(lambda scheme: scheme.with_dtype(dtype))

    def with_algorithm(self, algorithm: str) -> "Mixed":
        return self._each(lambda scheme: scheme.with_algorithm(algorithm))

    def _each(self, change: Callable[[Affine | TwoLevel], Any]) -> "Mixed":
        changed = (replace(group, scheme=change(group.scheme)) for group in self.groups)
        return Mixed(tuple(changed))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Mixed":
        entries = values.get("groups")
        entries = entries if isinstance(entries, list) else []
        count = len(entries)
        if values.keys() != {"kind", "groups"} or not 2 <= count <= MAX_GROUPS:
            raise RequestError(
                f"a scheme of kind {cls.kind} has {', '.join(map(str, values))} and {count} "
                f"groups; expected kind and groups, a list of 2 to {MAX_GROUPS}"
            )
        groups = tuple(map(RowGroup.from_dict, entries))
        if [group.rows is None for group in groups] != [False] * (count - 1) + [True]:
            raise RequestError(
                "of the groups of a scheme, the last has rows = null: all that no other group "
                'has; expected texts in the others, such as "0-255,300"'
            )
        return cls(groups)


def group_rows(schemes: Mapping[Any, np.ndarray]) -> Scheme:
    """Combines affine schemes, each with its rows [n] of a matrix; the last group has the most."""
    if len(schemes) == 1:
        return next(iter(schemes))
    *groups, (rest, _) = sorted(schemes.items(), key=lambda group: len(group[1]))
    named = (RowGroup(rows_text(np.sort(ids)), scheme) for scheme, ids in groups)
    return Mixed((*named, RowGroup(None, rest)))


@functools.lru_cache(maxsize=4)
def _members(scheme: Mixed, rows: int) -> tuple[np.ndarray, ...]:
    named = [rows_of(bounds) for bounds in scheme._bounds]
    rest = np.ones(rows, bool)
    rest[np.concatenate(named)] = False
    members = (*named, np.flatnonzero(rest).astype(np.int32))
    for ids in members:
        ids.flags.writeable = False
    return members


@functools.lru_cache(maxsize=64)
def row_bounds(text: str) -> np.ndarray:
    """Returns the ranges [ranges, 2] int64 (first row, one after the last) of `rows_text`."""
    ends = [one.partition("-") for one in text.split(",")] if _TEXT.fullmatch(text) else []
    pairs = [(int(first), int(last or first) + 1) for first, _, last in ends]
    bounds = np.array(pairs, np.int64).reshape(-1, 2)
    sound = len(bounds) and (bounds[:, 0] < bounds[:, 1]).all() and _text(bounds) == text
    if not sound or bounds[-1, 1] > MAX_ROWS:
        excerpt = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
        raise RequestError(
            f"a row group has rows {excerpt!r}; expected ascending ranges with gaps between them, "
            'such as "0-255,300,412-500"'
        )
    bounds.flags.writeable = False
    return bounds


def rows_text(rows: np.ndarray) -> str:
    last = np.flatnonzero(np.diff(rows) != 1)
    starts, ends = rows[np.append(0, last + 1)], rows[np.append(last, len(rows) - 1)]
    return _text(np.stack([starts, ends + 1], 1).astype(np.int64))


def rows_of(bounds: np.ndarray) -> np.ndarray:
    """Returns the row numbers in ranges, ascending, int32."""
    lengths = bounds[:, 1] - bounds[:, 0]
    before = np.cumsum(lengths) - lengths
    offsets = np.repeat(bounds[:, 0] - before, lengths)
    return (offsets + np.arange(lengths.sum())).astype(np.int32)


def count_rows(bounds: np.ndarray) -> int:
    return int((bounds[:, 1] - bounds[:, 0]).sum())


def _text(bounds: np.ndarray) -> str:
    """The text of ranges, those that touch or overlap merged."""
    pairs: list[list[int]] = []
    for start, stop in bounds.tolist():
        if pairs and start <= pairs[-1][1]:
            pairs[-1][1] = max(pairs[-1][1], stop)
        else:
            pairs.append([start, stop])
    return ",".join(f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairs)
