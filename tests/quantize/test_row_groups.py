"""Row groups: their texts, and which rows they have, against plain Python sets."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.quantize.fitting import fitted, with_dtype
from rgexport.quantize.plan import precision_of
from rgexport.quantize.row_groups import group_sizes, in_order, members, places
from rgexport.quantize.row_ranges import row_bounds, rows_of, rows_text
from rgexport.quantize.scheme import (
    Affine,
    Mixed,
    Palette,
    RowGroup,
    coarsest,
    scheme_from_dict,
    scheme_to_dict,
    uniform_schemes,
)

INT4, INT8 = Affine(4, 32, symmetric=True), Affine(8, 128, symmetric=True)
MIXED = Mixed((RowGroup("0-2,5", INT8), RowGroup("3", INT4), RowGroup(None, INT4)))
row_sets = st.sets(st.integers(0, 200), min_size=1).map(sorted)


@given(row_sets)
def test_a_set_of_rows_comes_back_from_its_text(rows: list[int]) -> None:
    text = rows_text(np.array(rows))
    listed = [
        row
        for part in text.split(",")
        for row in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assert listed == rows
    assert rows_of(row_bounds(text)).tolist() == rows


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "1-", "-1", "1,", "0-3 ", "1--2", "٣", "1,2", "0-1,2", "3-3", "5-3", "3,1"),
        *("0-4,3", "01", "0x1", "99999999999", "0-2147483648"),
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    """Also those that mean the same as another: equal schemes are equal texts."""
    with pytest.raises(RequestError, match="expected ascending ranges"):
        row_bounds(text)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Mixed, list[list[int]]]:
    """A scheme, and the rows of each of its groups."""
    owners = draw(st.lists(st.integers(0, 3), min_size=2, max_size=60))
    kinds = sorted(set(owners))
    if len(kinds) < 2:
        owners[0] = kinds[0] + 1
        kinds = sorted(set(owners))
    rows = [[row for row, owner in enumerate(owners) if owner == kind] for kind in kinds]
    named = [RowGroup(rows_text(np.array(group)), INT8) for group in rows[:-1]]
    return Mixed((*named, RowGroup(None, INT4))), rows


@given(partitions())
def test_each_row_is_in_its_group_at_its_place(case: tuple[Mixed, list[list[int]]]) -> None:
    scheme, rows = case
    count = sum(map(len, rows))
    assert group_sizes(scheme, count) == tuple(map(len, rows))
    assert [group.tolist() for group in members(scheme, count)] == rows
    stored = [row for group in rows for row in group]
    found = places(scheme, count)
    assert found.dtype == np.int32
    assert [stored[place] for place in found] == list(range(count))
    assert in_order(scheme) == (stored == list(range(count)))
    again = scheme_from_dict(json.loads(json.dumps(scheme_to_dict(scheme))))
    assert again == scheme and hash(again) == hash(scheme)


def test_what_people_and_other_code_see_of_it() -> None:
    assert MIXED.label == "int8/128 (4 rows) + int4/32 (1 row) + int4/32"
    assert uniform_schemes(MIXED) == (INT8, INT4, INT4)
    assert coarsest([INT8, MIXED]) == INT4
    assert precision_of({"a": INT8, "b": MIXED}) == "int4"


def test_groups_are_fitted_as_matrices_are() -> None:
    found = with_dtype(fitted(MIXED, (9, 48)), "float16")
    blocks = [(s.block, s.scale) for s in uniform_schemes(found) if isinstance(s, Affine)]
    assert blocks == [(None, "float16"), (24, "float16"), (24, "float16")]
    assert [s.bits for s in uniform_schemes(fitted(MIXED, (9, 33))) if isinstance(s, Affine)] == [
        *(8, 8, 8)
    ]


def test_rows_that_the_matrix_does_not_have() -> None:
    huge = Mixed((RowGroup("0-2147483646", INT8), RowGroup(None, INT4)))
    assert group_sizes(huge, 1 << 40) == ((1 << 31) - 1, (1 << 40) - (1 << 31) + 1)
    assert group_sizes(MIXED, 7) == (4, 1, 2)
    with pytest.raises(RequestError, match="has row 5; expected rows below 5"):
        group_sizes(MIXED, 5)
    with pytest.raises(RequestError, match="name all 6 rows"):
        group_sizes(Mixed((RowGroup("0-5", INT8), RowGroup(None, INT4))), 6)
    overlapping = Mixed((RowGroup("0-5", INT8), RowGroup("4", INT4), RowGroup(None, INT4)))
    with pytest.raises(RequestError, match="row 4 is in two row groups"):
        group_sizes(overlapping, 9)


def _with(**changes: Any) -> dict[str, Any]:
    fields = json.loads(json.dumps(scheme_to_dict(MIXED)))
    fields["groups"][0] |= changes
    return fields  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "mixed"}, "has kind and 0 groups; expected kind and groups"),
        ({"kind": "mixed", "groups": {}}, "0 groups"),
        ({"kind": "mixed", "groups": _with()["groups"][:1]}, "1 groups; .* 2 to 16"),
        ({"kind": "mixed", "groups": _with()["groups"] * 6}, "18 groups"),
        (_with() | {"more": 1}, "expected kind and groups"),
        (_with(rows=None), "the last has rows = null"),
        ({"kind": "mixed", "groups": _with()["groups"][:2]}, "the last has rows = null"),
        (_with(rows=3), "rows 3; expected a text or null"),
        (_with(rows="5,1"), "rows '5,1'; expected ascending"),
        (_with(more=3), "a row group has rows, scheme, more"),
        ({"kind": "mixed", "groups": [1, 2]}, "a row group has int"),
        (_with(scheme=scheme_to_dict(Palette())), "of kind 'palette'; expected affine"),
        (_with(scheme=scheme_to_dict(MIXED)), "of kind 'mixed'; expected affine"),
        (_with(scheme=4), "of kind None"),
        (_with(scheme={"kind": "affine", "bits": 4}), "expected bits, block, symmetric"),
        ({"kind": ["mixed"]}, "kind"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        scheme_from_dict(fields)
