"""What plans choose for, and the plans that come of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.compress.items import items_of, plan_of
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, model_tensors
from rgexport.quantize.row_groups import members
from rgexport.quantize.scheme import Affine, Float, Mixed
from tests.models import ODD_CONFIGS, make_config

INT4, INT4_16, INT8 = (
    Affine(bits, block, symmetric=True) for bits, block in ((4, 32), (4, 16), (8, 32))
)


@pytest.mark.parametrize("config", ODD_CONFIGS.values(), ids=ODD_CONFIGS)
def test_each_matrix_is_in_one_item(config):
    tensors = model_tensors(config)
    items = items_of(config, None)
    names = [name for item in items for name in item.tensors]
    assert sorted(names) == sorted(n for n, spec in tensors.items() if spec.role in QUANTIZABLE)
    assert all(tensors[name].shape == item.shape for item in items for name in item.tensors)


def test_linears_of_one_input_and_shape_go_together():
    config = make_config("ra", width=64, heads=2)
    found = {item.tensors for item in items_of(config, None)}
    for index, block, ends in (
        (0, "temporal_block", ("linear_y", "linear_x")),
        (0, "mlp_block", ("gate_proj", "up_proj")),
        (1, "temporal_block", ("k_proj", "v_proj")),
        (1, "temporal_block", ("q_proj",)),
    ):
        assert tuple(f"layers.{index}.{block}.{end}.weight" for end in ends) in found


@given(st.integers(1, 6000), st.integers(0, 2**32 - 1))
def test_row_groups_have_all_rows_the_most_important_first(vocab, seed):
    config = make_config("r", width=32, heads=1, vocab_size=vocab)
    importance = np.random.default_rng(seed).random(vocab).astype(np.float32)
    groups = [item.rows for item in items_of(config, importance) if item.tensors == (EMBEDDING,)]
    order = np.concatenate(groups)
    assert sorted(order) == list(range(vocab))
    assert (np.diff(importance[order]) <= 0).all()
    assert len(groups) == 1 or min(map(len, groups)) >= 256


@given(st.lists(st.sampled_from([INT4, INT4_16, INT8]), min_size=4, max_size=4))
def test_rows_get_the_layouts_of_their_groups(layouts):
    config = make_config("r", width=32, heads=1, vocab_size=2048)
    items = items_of(config, np.random.default_rng(0).random(2048).astype(np.float32))
    chosen = [*layouts, *(INT8 for _ in items[4:])]
    assert [len(item.rows) for item in items[:4]] == [256, 256, 512, 1024]
    plan = plan_of(config, items, chosen)
    scheme = plan[EMBEDDING]
    if len(set(layouts)) == 1:
        assert scheme == layouts[0]
        return
    assert isinstance(scheme, Mixed) and len(scheme.groups) == len(set(layouts))
    for group, ids in zip(scheme.groups, members(scheme, 2048), strict=True):
        wanted = [i.rows for i, one in zip(items, layouts, strict=False) if one == group.scheme]
        assert sorted(np.concatenate(wanted)) == ids.tolist()
    others = {name: one for name, one in plan.items() if name != EMBEDDING}
    quantized = {name for item in items[4:] for name in item.tensors}
    assert {name for name, one in others.items() if one == INT8} == quantized
    assert {one for name, one in others.items() if name not in quantized} == {Float("float32")}
