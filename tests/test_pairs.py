"""The cases that are kept hold every pair of values."""

from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pairs import covering_rows, pairwise


@dataclass(frozen=True)
class CallSpec:
    """The part of pytest's that is read."""

    _idlist: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    nodeid: str
    callspec: CallSpec


def cases(test: str, *sizes: int) -> list[Case]:
    """The whole product of parameters with so many values."""
    rows = product(*(map(str, range(size)) for size in sizes))
    return [Case(f"{test}[{'-'.join(row)}]", CallSpec(row)) for row in rows]


def pairs(of_cases: list[Case]) -> set[tuple]:
    rows = (enumerate(case.callspec._idlist) for case in of_cases)
    return {pair for row in rows for pair in combinations(row, 2)}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 3, 2), (4, 2, 9, 4, 3), (1, 5, 4)])
def test_every_pair_is_kept(sizes):
    whole = cases("test", *sizes)
    kept = pairwise(whole)
    assert pairs(kept) == pairs(whole)
    assert kept == [case for case in whole if case in set(kept)]
    assert len(kept) < len(whole) or 1 in sizes


@given(st.lists(st.integers(1, 7), min_size=3, max_size=6))
def test_few_rows_hold_every_pair(sizes):
    values = [[f"{name}" for name in range(size)] for size in sizes]
    rows = covering_rows(values)
    assert rows == covering_rows(values) and {*rows} <= {*product(*values)}
    for one, other in combinations(range(len(sizes)), 2):
        held = {(row[one], row[other]) for row in rows}
        assert held == {*product(values[one], values[other])}
    least = prod(sorted(sizes)[-2:])
    assert len(set(rows)) == len(rows) <= 2 * least


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 3, 3, 3), 12), ((2,) * 10, 12), ((4, 4, 4, 4, 4), 28)]
)
def test_rows_are_few(sizes, most):
    """At most so many; the smallest possible numbers are 9, 6 and 16."""
    assert len(covering_rows([[str(name) for name in range(size)] for size in sizes])) <= most


def test_other_cases_all_run():
    """Those of two parameters, of several tests, and those that were asked for by name."""
    one, other, two = cases("one", 3, 3, 3), cases("other", 3, 3, 3), cases("two", 3, 4)
    assert pairwise(two) == two and pairwise(one[5:9]) == one[5:9]
    assert pairwise([*one, *other]) == [*pairwise(one), *pairwise(other)]
