"""The cases that are kept hold every pair of values."""

from dataclasses import dataclass
from itertools import combinations, product

import pytest

from tests.pairs import pairwise


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


def test_other_cases_all_run():
    """Those of two parameters, of several tests, and those that were asked for by name."""
    one, other, two = cases("one", 3, 3, 3), cases("other", 3, 3, 3), cases("two", 3, 4)
    assert pairwise(two) == two and pairwise(one[5:9]) == one[5:9]
    assert pairwise([*one, *other]) == [*pairwise(one), *pairwise(other)]
