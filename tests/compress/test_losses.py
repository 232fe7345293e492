"""Predicted losses, beside the formula on whole matrices, and the weights of plans."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.compress.items import Item, items_of
from rgexport.compress.losses import Losses
from rgexport.compress.stored_weights import quantized
from rgexport.griffin.layout import EMBEDDING, input_site, model_tensors
from rgexport.griffin.tensor import from_array
from rgexport.quantize import affine, algorithms, palette
from rgexport.quantize.row_ranges import rows_text
from rgexport.quantize.scheme import Affine, Float, Mixed, Palette, RowGroup
from rgexport.quantize.statistics import Calibrated, no_statistics, statistics_of
from tests.models import make_config, random_weights

CONFIG = make_config("ra", width=64, heads=2, mlp_width=96, vocab_size=1024)
WEIGHTS = random_weights(CONFIG)
SOURCE = {name: from_array(array) for name, array in WEIGHTS.items()}
LAYOUTS = [Affine(4, 32, True, algorithm="gptq"), Affine(8, 32, True, algorithm="search")]


@dataclass
class Known:
    """Statistics as a calibration has them, of correlated random inputs."""

    tokens: int = 500
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    found: dict = field(default_factory=dict)

    def __post_init__(self):
        rows = CONFIG.vocab_size
        self.row_fisher, self.token_share = self.rng.dirichlet(np.ones(rows), 2)
        self.row_fisher[::8] = 0
        self.row_sensitivity = self.row_fisher + 1e-4
        self.lookup_sensitivity = self.rng.random(CONFIG.width)

    def hessian(self, tensor):
        columns = WEIGHTS[tensor].shape[1]
        blocks = (columns // 2, columns // 2) if "down" in tensor else (columns,)
        return self.found.setdefault(input_site(tensor), [self.random(size) for size in blocks])

    def importance(self, tensor):
        return np.concatenate([np.diagonal(block) for block in self.hessian(tensor)])

    def random(self, size):
        x = self.rng.normal(size=(500, size)) @ self.rng.normal(size=(size, size))
        return (x.T @ x / 500).astype(np.float32)

    def output_sensitivity(self, tensor):
        return np.linspace(0.1, 2, len(WEIGHTS[tensor]), dtype=np.float32)


def error(tensor, layout, known):
    blocks = known.hessian(tensor)
    ids = np.arange(len(WEIGHTS[tensor]))
    statistics = statistics_of(blocks, known.tokens)
    if tensor == EMBEDDING:
        statistics = Calibrated(known, CONFIG)(tensor)
        assert {*statistics.kinds.kind[::8]} == {2} and len({*statistics.kinds.kind}) > 1
    parts = algorithms.encode(tensor, WEIGHTS[tensor], layout, statistics, ids)
    return affine.decode(parts, layout, WEIGHTS[tensor].shape[1]) - WEIGHTS[tensor]


def whole(blocks):
    size = sum(map(len, blocks))
    hessian, start = np.zeros((size, size)), 0
    for block in blocks:
        part = slice(start, start + len(block))
        hessian[part, part], start = block, start + len(block)
    return hessian


@pytest.mark.parametrize("item", items_of(CONFIG, None)[1:], ids=lambda item: item.tensors[0])
def test_the_loss_of_linears_is_that_of_the_formula(item):
    known = Known()
    found = Losses(CONFIG, SOURCE, known).of(item, LAYOUTS)
    for loss, layout in zip(found, LAYOUTS, strict=True):
        wanted = 0.0
        for tensor in item.tensors:
            delta, sensitivity = error(tensor, layout, known), known.output_sensitivity(tensor)
            outputs = np.diag(delta @ whole(known.hessian(tensor)) @ delta.T)
            wanted += 0.5 * float(sensitivity @ outputs)
        assert loss == pytest.approx(wanted, rel=1e-4)


def test_rows_of_the_head_cost_as_head_and_as_embedding():
    known, ids = Known(), np.array([900, 3, 512, 77])
    item = Item((EMBEDDING,), (4, CONFIG.width), ids)
    found = Losses(CONFIG, SOURCE, known).of(item, LAYOUTS)
    for loss, layout in zip(found, LAYOUTS, strict=True):
        delta = error(EMBEDDING, layout, known)[ids]
        products = np.diag(delta @ whole(known.hessian(EMBEDDING)) @ delta.T)
        head = products @ known.row_sensitivity[ids]
        squares = (CONFIG.embedding_scale * delta) ** 2 @ known.lookup_sensitivity
        wanted = 0.5 * (head + squares @ known.token_share[ids])
        assert loss == pytest.approx(wanted, rel=1e-4)


def test_rows_count_by_what_the_same_errors_cost():
    known = Known()
    importance = Losses(CONFIG, SOURCE, known).row_importance()
    delta = np.random.default_rng(1).choice([-1, 1], (4000, CONFIG.width))
    for row in (0, 1, 500):
        head = np.einsum("nk,kl,nl->n", delta, whole(known.hessian(EMBEDDING)), delta).mean()
        squares = CONFIG.embedding_scale**2 * known.lookup_sensitivity.sum()
        wanted = known.row_sensitivity[row] * head + known.token_share[row] * squares
        assert CONFIG.width * importance[row] == pytest.approx(wanted, rel=0.1)


def test_some_rows_stand_for_all():
    losses = Losses(CONFIG, SOURCE, Known())
    item = Item((EMBEDDING,), (1024, CONFIG.width), np.argsort(-Known().row_fisher))
    for few, all_rows in zip(
        losses.of(item, LAYOUTS, sample=128), losses.of(item, LAYOUTS, sample=1024), strict=True
    ):
        assert few == pytest.approx(all_rows, rel=0.2)


UP = "layers.0.mlp_block.up_proj.weight"
MIXED = Mixed(
    (
        RowGroup(rows_text(np.array([0, 1, 2, 40, 90, 91])), Affine(8, 32, True)),
        RowGroup(None, Affine(4, 32, True)),
    )
)


@settings(deadline=None)
@given(st.sampled_from([Affine(4, 32, True), Palette(4, 16), MIXED]), st.data())
def test_rows_of_a_quantized_tensor_do_not_depend_on_the_slab(scheme, data):
    plan = {name: Float("float32") for name in model_tensors(CONFIG)} | {UP: scheme}
    tensor = quantized(SOURCE, plan, no_statistics)[UP]
    start = data.draw(st.integers(0, 95))
    stop = data.draw(st.integers(start + 1, 96))
    np.testing.assert_array_equal(tensor.read(start, stop), by_groups(scheme)[start:stop])


def by_groups(scheme):
    rows = WEIGHTS[UP]
    if isinstance(scheme, Palette):
        return palette.decode(algorithms.encode(UP, rows, scheme), scheme, rows.shape[1])
    if isinstance(scheme, Affine):
        return affine.decode(affine.encode(rows, scheme), scheme, rows.shape[1])
    few, many = scheme.groups[0].scheme, scheme.groups[1].scheme
    found = affine.decode(affine.encode(rows, many), many, rows.shape[1])
    ids = [0, 1, 2, 40, 90, 91]
    found[ids] = affine.decode(affine.encode(rows[ids], few), few, rows.shape[1])
    return found
