"""Of a test with three or more parameters, runs only as many cases as cover all pairs of values.

Most faults show with one value or with a pair of them; all pairs take a tenth of the cases of the
whole product. Parameters of fixtures count, too. `--whole-product` runs everything.
"""

from collections import defaultdict
from collections.abc import Container, Sequence
from functools import partial
from itertools import combinations, product
from math import prod

import pytest

Ids = tuple[str, ...]
"""What pytest calls the values of a case, one for each `parametrize` or fixture."""
Setting = tuple[int, str]  # the number of a parameter, and one of its values
Pair = tuple[Setting, Setting]  # in the order of the parameters


def pairwise(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases to run, in their order."""
    kept: set[pytest.Item] = set()
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.split("[")[0]].append(item)
    for cases in tests.values():
        needed = _needed([_ids(case) for case in cases])
        kept |= {case for case in cases if _ids(case) in needed}
    return [item for item in items if item in kept]


def covering_rows(values: Sequence[Sequence[str]]) -> list[Ids]:
    """Returns rows, one value of each parameter, that together have every pair of values.

    Each row starts with a pair that is still missing, and then takes, for the other parameters, the
    values that complete most missing pairs.
    """
    settings = [[(number, value) for value in row] for number, row in enumerate(values)]
    settings.sort(key=len, reverse=True)  # parameters with many values leave least choice
    missing = dict.fromkeys(  # ordered, unlike a set
        _pair(one, other)
        for columns in combinations(settings, 2)
        for one, other in product(*columns)
    )
    rows = []
    while missing:
        row = [*next(iter(missing))]
        for column in settings:
            if column[0][0] not in dict(row):
                row.append(max(column, key=partial(_completed, row, missing)))
        for covered in combinations(row, 2):
            missing.pop(_pair(*covered), None)
        rows.append(tuple(value for _, value in sorted(row)))
    return rows


def _completed(row: list[Setting], missing: Container[Pair], new: Setting) -> int:
    return sum(_pair(new, setting) in missing for setting in row)


def _pair(one: Setting, other: Setting) -> Pair:
    return (one, other) if one < other else (other, one)


def _ids(case: pytest.Item) -> Ids:
    return tuple(case.callspec._idlist) if hasattr(case, "callspec") else ()


def _needed(cases: list[Ids]) -> set[Ids]:
    """All cases, where they are no whole product: somebody has chosen some by name."""
    values = [list(dict.fromkeys(of_parameter)) for of_parameter in zip(*cases, strict=True)]
    if len(values) < 3 or prod(map(len, values)) != len(cases):
        return set(cases)
    return set(covering_rows(values))
