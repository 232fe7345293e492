"""Plans: their files, row groups, how schemes are fitted to shapes, and the best of all plans."""

import json
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.planning.allocation import Option, solve
from rgexport.quantize.plan import (
    COREML_PRECISIONS,
    WEB_PRECISIONS,
    choose_scheme,
    load_plan,
    make_plan,
    precision_of,
)
from rgexport.quantize.schemes.registry import (
    Affine,
    Float,
    Mixed,
    Palette,
    RowGroup,
    coarsest,
    scheme_from_dict,
)
from rgexport.quantize.schemes.row_groups import row_bounds, rows_of, rows_text
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["irregular"]
LINEAR = "layers.0.mlp_block.up_proj.weight"
LINEAR_BIAS = "layers.0.mlp_block.up_proj.bias"
GATE = "layers.0.temporal_block.rg_lru.input_gate_weight"
GATE_BIAS = "layers.0.temporal_block.rg_lru.input_gate_bias"
CONV_BIAS = "layers.0.temporal_block.conv_1d.bias"
PLAN = make_plan(CONFIG, Affine(4, 32, symmetric=False), Affine(8, 64, symmetric=True))


def written(folder, changes):
    entries = {name: scheme.to_dict() for name, scheme in PLAN.items()}
    path = folder / "plan.json"
    path.write_text(json.dumps({"plan": entries | changes}))
    return path


@pytest.mark.parametrize(
    ("tensor", "scheme", "complaint"),
    [
        (LINEAR, {"kind": "affine", "bits": 4, "block": 32.0, "symmetric": True}, "block is 32.0"),
        (LINEAR, {"kind": "affine", "bits": 4}, "block is missing"),
        (LINEAR, {"kind": "vector"}, "kind 'vector'; expected one of"),
        (LINEAR, {"kind": "palette", "algorithm": "rtn"}, "algorithm is 'rtn'; expected kmeans"),
        (CONV_BIAS, {"kind": "float", "dtype": "float16"}, "expected float32$"),
        (LINEAR_BIAS, {"kind": "palette"}, "expected float32 or float16$"),
        (GATE, {"kind": "float", "dtype": "float16"}, "expected float32 or bfloat16$"),
        (GATE_BIAS, {"kind": "float", "dtype": "bfloat16"}, "a gate .* expected float32$"),
        (LINEAR, {"kind": "float", "dtype": "bfloat16"}, "only the matrices of gates"),
        ("layers.9.mlp_block.up_proj.weight", {}, "layers.9"),
    ],
)
def test_wrong_plans(tensor, scheme, complaint, tmp_path):
    with pytest.raises(RequestError, match=complaint) as refusal:
        load_plan(written(tmp_path, {tensor: scheme}), CONFIG)
    assert "plan.json" in str(refusal.value)


@pytest.mark.parametrize("word", COREML_PRECISIONS)
def test_a_precision_has_defaults_and_is_the_name_of_a_plan(word, tmp_path):
    scheme = choose_scheme(word, precisions=COREML_PRECISIONS)
    plan = make_plan(CONFIG, scheme, Float("float32"))
    changes = {name: one.to_dict() for name, one in plan.items()}
    assert precision_of(plan) == word and load_plan(written(tmp_path, changes), CONFIG) == plan
    assert choose_scheme("int8") == Affine(8, 128, symmetric=True)
    assert choose_scheme("int4", symmetric=False) == Affine(4, 32, symmetric=False)
    assert choose_scheme("int4", precisions=WEB_PRECISIONS) == Affine(4, 128, symmetric=False)


INT4, INT8 = Affine(4, 32, symmetric=True), Affine(8, 128, symmetric=True)
MIXED = Mixed((RowGroup("0-2,5", INT8), RowGroup("3", INT4), RowGroup(None, INT4)))


@pytest.mark.parametrize(
    "text",
    ["", "a", "1-", "-1", "1,", "0-3 ", "1--2", "٣", "1,2", "0-1,2", "3-3", "5-3", "3,1", "0-4,3",
     "01", "99999999999", "0-2147483648"],
)  # fmt: skip
def test_texts_that_mean_the_same_as_others_or_nothing_are_refused(text):
    with pytest.raises(RequestError, match="expected ascending ranges"):
        row_bounds(text)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=60).filter(lambda x: len(set(x)) > 1))
def test_each_row_is_in_its_group_at_its_place(owners):
    rows = [[i for i, owner in enumerate(owners) if owner == kind] for kind in sorted(set(owners))]
    texts = [rows_text(np.array(group)) for group in rows]
    for text, group in zip(texts, rows, strict=True):
        ranges = [[*map(int, part.split("-"))] for part in text.split(",")]
        assert [row for ends in ranges for row in range(ends[0], ends[-1] + 1)] == group
        assert rows_of(row_bounds(text)).tolist() == group
    scheme = Mixed((*(RowGroup(text, INT8) for text in texts[:-1]), RowGroup(None, INT4)))
    count, stored = len(owners), [row for group in rows for row in group]
    assert scheme.group_sizes(count) == tuple(map(len, rows))
    assert [ids.tolist() for _, _, ids in scheme.row_groups(count)] == rows
    positions = scheme.positions(count)
    assert (positions is None) == (stored == list(range(count)))
    assert positions is None or [stored[i] for i in positions] == list(range(count))
    again = scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme and hash(again) == hash(scheme)


def test_an_older_manifest_has_float32_scales():
    older = {"kind": "affine", "bits": 4, "block": 32, "symmetric": True, "algorithm": "rtn"}
    assert scheme_from_dict(older) == Affine(4, 32, symmetric=True, scale="float32")


def test_row_groups_are_named_and_fitted_as_matrices_are():
    assert MIXED.label == "int8/128 (4 rows) + int4/32 (1 row) + int4/32"
    assert coarsest([INT8, MIXED]) == INT4 and precision_of({"a": INT8, "b": MIXED}) == "int4"
    even = MIXED.fitted((9, 48)).with_dtype("float16").uniform
    blocks = [(s.block, s.scale) for s in even]
    assert blocks == [(None, "float16"), (24, "float16"), (24, "float16")]
    assert [s.bits for s in MIXED.fitted((9, 33)).uniform] == [8, 8, 8]


def test_rows_that_the_matrix_does_not_have():
    huge = Mixed((RowGroup("0-2147483646", INT8), RowGroup(None, INT4)))
    assert huge.group_sizes(1 << 40) == ((1 << 31) - 1, (1 << 40) - (1 << 31) + 1)
    overlapping = Mixed((RowGroup("0-5", INT8), RowGroup("4", INT4), RowGroup(None, INT4)))
    whole = Mixed((RowGroup("0-5", INT8), RowGroup(None, INT4)))
    for scheme, rows, complaint in (
        (MIXED, 5, "has row 5; expected rows below 5"),
        (whole, 6, "name all 6 rows"),
        (overlapping, 9, "row 4 is in two row groups"),
    ):
        with pytest.raises(RequestError, match=complaint):
            scheme.group_sizes(rows)


FIRST, *REST = MIXED.to_dict()["groups"]


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ({}, "0 groups"),
        ([FIRST], "1 groups; .* 2 to 16"),
        ([FIRST | {"rows": 3}, *REST], "rows 3; expected a text or null"),
        ([FIRST | {"more": 3}, *REST], "expected rows and scheme"),
        ([FIRST | {"scheme": Palette().to_dict()}, *REST], "'palette'.*; expected kind affine"),
    ],
)
def test_wrong_row_groups(groups, complaint):
    with pytest.raises(RequestError, match=complaint):
        scheme_from_dict({"kind": "mixed", "groups": groups})


@pytest.mark.parametrize(
    ("asked", "shape", "expected"),
    [
        (Affine(4, 32, True), (9, 64), Affine(4, 32, True)),
        (Affine(4, 32, True), (9, 48), Affine(4, 24, True)),
        (Affine(4, 64, True), (9, 64), Affine(4, None, True)),
        (Affine(4, 32, True), (9, 33), Affine(8, 11, True)),
        (Affine(8, 32, True), (9, 74), Affine(8, None, True)),  # blocks of 2 cost too much
        (Affine(4, 64, False), (9, 64), Affine(4, 32, False)),  # an even number of zero points
        (Affine(4, 32, False), (9, 74), Affine(4, 37, False)),
        (Affine(4, None, False, scale="float16"), (9, 48), Affine(4, 24, False, scale="float16")),
        (Palette(group=16), (24, 48), Palette(group=12)),
        (Palette(lut="float32"), (24, 33), Affine(8, None, True, scale="float32")),
        (Float("float16"), (24, 33), Float("float16")),
    ],
)
def test_blocks_and_groups_divide_a_matrix(asked, shape, expected):
    assert asked.fitted(shape) == expected.fitted(shape) == expected


def test_no_other_block_takes_fewer_bytes():
    """Small blocks cost scales, large ones padding."""
    for columns, block, fewest in ((288, 128, 32), (256, 128, 128), (130, 128, 32), (16, 64, 16)):
        asked = Affine(4, block, symmetric=True)
        assert asked.least_padded(columns) == replace(asked, block=fewest)
    assert Affine(8, None, True).least_padded(288) == Affine(8, None, True)


OPTIONS = st.builds(
    Option, st.integers(1, 10**7), st.floats(0, 1, allow_subnormal=False).map(lambda x: x + 1e-6)
)
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


@given(ITEMS, st.floats(0, 1), st.integers(2, 12))
def test_an_allocation_is_the_best_of_all_choices(items, share, count):
    front = solve(items)
    choices = [
        (sum(one.bytes for one in options), sum(one.loss for one in options))
        for options in product(*items)
    ]
    sizes, losses = map(np.array, zip(*choices, strict=True))
    # Rounding up may waste a unit for each item: the best in so much less is the bound.
    waste = len(items) * (1 + (sizes.max() - sizes.min()) // 100_000)
    budget = sizes.min() + 1.2 * share * (sizes.max() - sizes.min())
    least = front.within(budget)
    bound = losses[sizes <= max(budget - waste, sizes.min())].min()
    assert least.bytes <= budget
    assert losses[sizes <= budget].min() * (1 - 1e-9) <= least.loss <= bound * (1 + 1e-9)

    target = losses.min() + share * (losses.max() - losses.min()) + 1e-12
    smallest, fewest = front.below(target), sizes[losses <= target].min()
    assert smallest.loss <= target * (1 + 1e-9) and fewest <= smallest.bytes <= fewest + waste
    points = front.points(count)
    assert 1 <= len(points) <= count and points[0].bytes == front.least == sizes.min()
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in pairwise(points))
    for point in points:
        chosen = [options[pick] for options, pick in zip(items, point.picks, strict=True)]
        assert point.bytes == sum(one.bytes for one in chosen)
        assert point.loss == pytest.approx(sum(one.loss for one in chosen))


def test_nothing_is_small_or_good_enough():
    front = solve([[Option(10, 1.0), Option(20, 0.5)], [Option(5, 1.0)]])
    assert front.within(14) is None and front.below(1.4) is None
    assert front.within(15).picks == (0, 0) and front.below(1.5).picks == (1, 0)
