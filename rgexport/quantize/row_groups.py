"""Row groups: which rows of a matrix each group has, and where they are.

The rows of a group stay in their order. So consecutive rows of the matrix are consecutive in each
group, and a slab is read and written in one piece for each group. The *place* of a row is its
number in all groups, one after another.
"""

import functools

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize.row_ranges import count_rows, row_bounds, rows_of
from rgexport.quantize.scheme import Mixed


def group_sizes(scheme: Mixed, rows: int) -> tuple[int, ...]:
    """How many rows of a matrix of `rows` rows each group has, at least one.

    Nothing here takes memory for each row.

    Raises:
        RequestError: groups share a row, or name one that the matrix lacks, or leave none over.
    """
    bounds = _all_bounds(scheme)
    if (shared := bounds[1:, 0] < bounds[:-1, 1]).any():
        row = bounds[1:][shared][0, 0]
        raise RequestError(f"row {row} is in two row groups; expected each row in one of them")
    if bounds[-1, 1] > rows:
        raise RequestError(
            f"a row group has row {bounds[-1, 1] - 1}; expected rows below {rows}, as many as the "
            "tensor has"
        )
    sizes = [count_rows(row_bounds(group.rows)) for group in scheme.groups if group.rows]
    rest = rows - sum(sizes)
    if not rest:
        raise RequestError(
            f"the row groups name all {rows} rows; expected some that are left to the last group"
        )
    return (*sizes, rest)


def members(scheme: Mixed, rows: int) -> tuple[np.ndarray, ...]:
    """The rows of each group, ascending, int32."""
    group_sizes(scheme, rows)
    return _members(scheme, rows)


def places(scheme: Mixed, rows: int) -> np.ndarray:
    """The place of each row, int32 [rows]."""
    found = np.empty(rows, np.int32)
    found[np.concatenate(members(scheme, rows))] = np.arange(rows, dtype=np.int32)
    return found


def in_order(scheme: Mixed) -> bool:
    """Whether every row has its own number as its place: groups are ranges, one after another."""
    bounds = np.concatenate([row_bounds(group.rows) for group in scheme.groups if group.rows])
    starts = np.append(0, bounds[:-1, 1])
    return bool((bounds[:, 0] == starts).all())


@functools.lru_cache(maxsize=4)
def _members(scheme: Mixed, rows: int) -> tuple[np.ndarray, ...]:
    named = [rows_of(row_bounds(group.rows)) for group in scheme.groups if group.rows]
    rest = np.ones(rows, bool)
    rest[np.concatenate(named)] = False
    found = (*named, np.flatnonzero(rest).astype(np.int32))
    for ids in found:
        ids.flags.writeable = False
    return found


def _all_bounds(scheme: Mixed) -> np.ndarray:
    """The ranges of all groups but the last, by their first row: [ranges, 2]."""
    bounds = np.concatenate([row_bounds(group.rows) for group in scheme.groups if group.rows])
    return bounds[np.argsort(bounds[:, 0], kind="stable")]
