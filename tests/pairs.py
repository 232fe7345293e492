"""Of a test with three or more parameters, runs only as many cases as cover all pairs of values.

Most faults show with one value or with a pair of them; all pairs take a tenth of the cases of the
whole product. Parameters of fixtures count, too. `--whole-product` runs everything.
"""

from collections import defaultdict
from collections.abc import Iterable
from math import prod

import pytest
from allpairspy import AllPairs

Ids = tuple[str, ...]
"""What pytest calls the values of a case, one for each `parametrize` or fixture."""


def pairwise(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases to run, in their order."""
    kept: set[pytest.Item] = set()
    for cases in _by_test(items).values():
        needed = _needed([_ids(case) for case in cases])
        kept |= {case for case in cases if _ids(case) in needed}
    return [item for item in items if item in kept]


def _by_test(items: Iterable[pytest.Item]) -> dict[str, list[pytest.Item]]:
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.split("[")[0]].append(item)
    return tests


def _ids(case: pytest.Item) -> Ids:
    return tuple(case.callspec._idlist) if hasattr(case, "callspec") else ()


def _needed(cases: list[Ids]) -> set[Ids]:
    """All cases, where they are no whole product: somebody has chosen some by name."""
    values = [list(dict.fromkeys(of_parameter)) for of_parameter in zip(*cases, strict=True)]
    if len(values) < 3 or prod(map(len, values)) != len(cases):
        return set(cases)
    return {tuple(row) for row in AllPairs(values)}
