"""Plans: what they choose for and from, what they are predicted to cost, and what they promise."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgexport.artifacts.format import format_of
from rgexport.errors import RequestError
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import GgufOptions, export_gguf
from rgexport.export.onnx.exporter import OnnxOptions, export_onnx
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, input_site, model_tensors
from rgexport.planning import search
from rgexport.planning.calibrate import CalibrationOptions, calibrate
from rgexport.planning.losses import OriginalRun, PredictedLosses
from rgexport.planning.plan_items import PlanItem, artifact_bytes, items_of, layout_bytes, plan_of
from rgexport.planning.plan_request import (
    PlanOptions,
    closing_line,
    is_plan,
    make_plans,
    page_of,
    plan_paths,
)
from rgexport.planning.search import Planner, PlanTarget
from rgexport.quantize.algorithms.calibrated import Calibrated
from rgexport.quantize.algorithms.calibration_file import open_calibration
from rgexport.quantize.algorithms.statistics import no_statistics, statistics_of
from rgexport.quantize.plan import bfloat16_gates, load_plan, plan_bits, quantized
from rgexport.quantize.schemes.registry import BFLOAT16, Affine, Float, Mixed, RowGroup, candidates
from rgexport.quantize.schemes.row_groups import rows_text
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, make_config, random_weights, weight_source, write_hugging_face
from tests.row_groups import decoded

SOME = ("int4/64 two-level", "int4/32 two-level", "int8/32")
"""Three layouts take less than half of the time of all."""
FEW = [scheme for scheme in candidates() if scheme.label in SOME]
INT4, INT4_16, INT8 = (Affine(*one, symmetric=True) for one in ((4, 32), (4, 16), (8, 32)))


def test_linears_of_one_input_and_shape_go_together():
    together = {item.tensors for item in items_of(make_config("ra", width=64, heads=2), None)}
    for block, ends in (
        ("0.temporal_block", ("linear_y", "linear_x")),
        ("0.mlp_block", ("gate_proj", "up_proj")),
        ("1.temporal_block", ("k_proj", "v_proj")),
    ):
        assert tuple(f"layers.{block}.{end}.weight" for end in ends) in together


@given(st.lists(st.sampled_from([INT4, INT4_16, INT8]), min_size=4, max_size=4))
def test_rows_get_the_layouts_of_their_groups(layouts):
    config = make_config("r", width=32, heads=1, vocab_size=2048)
    importance = np.random.default_rng(0).random(2048).astype(np.float32)
    items = items_of(config, importance)
    order = np.concatenate([item.rows for item in items[:4]])
    np.testing.assert_array_equal(order, np.argsort(-importance))
    assert [len(item.rows) for item in items[:4]] == [256, 256, 512, 1024]
    plan = plan_of(config, items, [*layouts, *(INT8 for _ in items[4:])])
    scheme = plan.pop(EMBEDDING)
    for name, spec in model_tensors(config).items():
        if name != EMBEDDING:
            assert plan[name] == (INT8 if spec.role in QUANTIZABLE else Float("float32"))
    if len(set(layouts)) == 1:
        assert scheme == layouts[0]
        return
    assert isinstance(scheme, Mixed) and len(scheme.groups) == len(set(layouts))
    for _, layout, ids in scheme.row_groups(2048):
        wanted = [i.rows for i, one in zip(items, layouts, strict=False) if one == layout]
        assert sorted(np.concatenate(wanted)) == ids.tolist()


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "asked", "export"),
    [
        ("onnx", OnnxOptions, export_onnx),
        ("coreml", CoreMLOptions, export_coreml),
        ("gguf", GgufOptions, export_gguf),
    ],
)
def test_an_artifact_is_as_large_as_predicted(kind, asked, export, tmp_path):
    checkpoint, form = open_checkpoint(size="demo"), format_of(kind)
    rows = np.random.default_rng(0).random(8192) if form.has_row_groups else None
    items = items_of(checkpoint.config, rows)
    options = [list(layout_bytes(form, item.shape)) for item in items]
    chosen = [some[i % len(some)] for i, some in enumerate(options)]
    plan, target = plan_of(checkpoint.config, items, chosen), tmp_path / "artifact"
    eyes = np.eye(256, dtype=np.float32), np.eye(768, dtype=np.float32)

    def statistics(name):
        return statistics_of([eyes["down_proj" in name]], 1000)

    export(checkpoint, asked(plan=plan), target, statistics=statistics)
    files = [target, *target.rglob("*")] if target.is_dir() else [target]
    written = sum(path.stat().st_size for path in files if path.is_file())
    assert artifact_bytes(form, plan, checkpoint) == pytest.approx(written, rel=0.005)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose gates are bfloat16."""
    config = make_config("rrarr", width=128, heads=2, mlp_width=384, vocab_size=2048)
    folder = tmp_path_factory.mktemp("planned") / "toy"
    weights = random_weights(config)
    return open_checkpoint(write_hugging_face(config, weights, folder, dtype="bfloat16"))


@pytest.fixture(scope="module")
def calibration(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "toy.calibration"
    return calibrate(checkpoint, CalibrationOptions(tokens=1024, gradient_tokens=512), path)


@pytest.fixture(scope="module")
def planner(checkpoint, calibration):
    known = open_calibration(calibration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rgexport.planning.plan_items.candidates", lambda: FEW)
        return Planner(checkpoint, known, format_of("onnx"), Calibrated(known, checkpoint.config))


@pytest.fixture(scope="module")
def text(calibration):
    return open_calibration(calibration).sequences[:1]


def bits_of(plan, config):
    """Of a weight, by hand: levels; a float16 for each block, or 8 bits and its share of one."""
    total, weights = 0.0, 0
    for name, spec in model_tensors(config).items():
        if spec.role in QUANTIZABLE:
            (rows, columns), scheme = spec.shape, plan[name]
            sizes = scheme.group_sizes(rows)
            for one, count in zip(scheme.uniform, sizes, strict=True):
                blocks = -(-columns // one.block)
                scales = 16 * blocks if one.bits == 8 else 8 * blocks + 16 * -(-blocks // 16)
                total += count * (columns * one.bits + scales)
            weights += rows * columns
    return total / weights


def test_bits_are_kept_and_the_prediction_is_near(planner, checkpoint, text):
    planned = planner.find(PlanTarget("bits", 4.6), text)
    assert 4.59 < planned.chosen.bits <= 4.6
    assert planned.chosen.bits == pytest.approx(bits_of(planned.plan, checkpoint.config), rel=1e-6)
    assert plan_bits(planned.plan, checkpoint.config) == pytest.approx(4.6, rel=3e-3)
    assert planned.measured.kl == pytest.approx(planned.chosen.kl, rel=0.3)
    assert isinstance(planned.plan[EMBEDDING], Mixed)
    gates = bfloat16_gates(checkpoint.config, checkpoint.weights)
    assert gates and {planned.plan[name] for name in gates} == {BFLOAT16}
    assert not any(format_of(kind).keeps_bfloat16_gates for kind in ("coreml", "gguf"))
    bits, losses = zip(*((point.bits, point.kl) for point in planned.front), strict=True)
    assert list(bits) == sorted(bits) and list(losses) == sorted(losses, reverse=True)
    assert (bits[0], bits[-1]) == pytest.approx((4.2335526, 8.5))


def test_a_quality_is_reached_and_a_size_kept(planner, text, checkpoint, tmp_path):
    planned = planner.find(PlanTarget("kl", 0.005), text)
    assert planned.measured.kl == pytest.approx(0.005, rel=0.1)
    assert planned.measured.tokens == sum(map(len, text))
    small = planner.find(PlanOptions(calibration=tmp_path, target_size="1.5 MB").target, text)
    assert 0.98 * 1_500_000 < small.chosen.size <= 1_500_000
    assert artifact_bytes(format_of("onnx"), small.plan, checkpoint) == small.chosen.size


def test_what_cannot_be_reached_is_refused(planner, text):
    for target, words in (
        (PlanTarget("kl", 1e-9), r"--target-kl is 1e-09, which no plan reaches; expected 0\.000\d"),
        (PlanTarget("size", 1e6), r"--target-size is 1\.00 MB, .* expected 1\.41 MB or more"),
        (PlanTarget("bits", 3), "--bits is 3, .* expected 4.234 or more"),
    ):
        with pytest.raises(RequestError, match=words):
            planner.find(target, text)


def test_the_file_is_a_plan_for_exports(checkpoint, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("rgexport.planning.plan_items.candidates", lambda: FEW)
    target, other = tmp_path / "demo.plan.json", tmp_path / "other.json"
    options = PlanOptions(calibration=calibration, bits=4.5, tokens=64)
    (report,) = make_plans(checkpoint, [options], target)
    with open(report) as file:
        fields = json.load(file)
    assert load_plan(target, checkpoint.config) == report.result.plan and is_plan(target)
    assert fields["target"] == {"bits": 4.5} and fields["text"]["tokens"] == 64
    assert fields["measured_kl"] > 0 and fields["predicted_kl"] > 0
    assert fields["standard_error"] is None  # of a single sequence
    bits = [point["bits"] for point in fields["front"]]
    assert bits == sorted(bits)
    page = page_of(target).read_text()
    assert "<svg" in page and "What bits cost" in page and "://" not in page
    text = report.as_text()
    assert "down_proj" in text and "4.23" in text and "from 1.3 times" in text
    assert "±" not in report.sentence()
    with pytest.raises(RequestError, match="a plan is JSON"):
        make_plans(checkpoint, [options], tmp_path / "plan.html")
    with pytest.raises(RequestError, match="--force"):
        make_plans(checkpoint, [options], target)
    for content in (b'{"a": 1}', b"\xff\x00"):  # no plans
        other.write_bytes(content)
        with pytest.raises(RequestError, match="something else than would"):
            make_plans(checkpoint, [options], other, force=True)
    page_of(tmp_path / "new.json").write_text("mine")
    with pytest.raises(RequestError, match="--force"):
        make_plans(checkpoint, [options], tmp_path / "new.json")


def test_several_targets_share_the_work(checkpoint, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("rgexport.planning.plan_items.candidates", lambda: FEW)
    alone, together = tmp_path / "alone.json", tmp_path / "all.plan.json"
    options = [
        PlanOptions(calibration=calibration, tokens=64, **target)
        for target in ({"bits": 4.5}, {"target_size": "9 MB"}, {"target_kl": 0.02})
    ]
    names = "all-4.5bits.plan.json", "all-9.00MB.plan.json", "all-0.02kl.plan.json"
    by_default = f"{checkpoint.name}-onnx-4.5bits.plan.json"
    assert [str(path) for path in plan_paths(checkpoint, options[:1], None)] == [by_default]
    runs = []
    monkeypatch.setattr(
        search, "OriginalRun", lambda *a, make=search.OriginalRun: runs.append(1) or make(*a)
    )
    reports = make_plans(checkpoint, options, together)
    assert len(runs) == 1 and tuple(report.path.name for report in reports) == names
    for report in reports:
        make_plans(checkpoint, [report.options], alone, force=True)
        assert report.path.read_text() == alone.read_text()
        assert closing_line(checkpoint, report).endswith(f" --calibration {calibration}")
    with pytest.raises(RequestError, match=r"--target-size is 1.00 MB, which no plan reaches"):
        make_plans(checkpoint, [PlanOptions(target_size="1MB")], tmp_path / "small.json")


CONFIG = make_config("ra", width=64, heads=2, mlp_width=96, vocab_size=1024)
WEIGHTS = random_weights(CONFIG)
SOURCE = weight_source(WEIGHTS)
LAYOUTS = [Affine(4, 32, True, algorithm="gptq"), Affine(8, 32, True, algorithm="search")]


class Known:
    """Statistics as a calibration has them, of correlated random inputs."""

    tokens = 500

    def __init__(self):
        self.rng, self.hessians = np.random.default_rng(0), {}
        self.row_fisher, self.token_share = self.rng.dirichlet(np.ones(CONFIG.vocab_size), 2)
        self.row_fisher[::8] = 0
        self.row_sensitivity = self.row_fisher + 1e-4
        self.lookup_sensitivity = self.rng.random(CONFIG.width)

    def hessian(self, tensor):
        columns = WEIGHTS[tensor].shape[1]
        blocks = (columns // 2, columns // 2) if "down" in tensor else (columns,)
        return self.hessians.setdefault(input_site(tensor), [self.random(size) for size in blocks])

    def importance(self, tensor):
        return np.concatenate([np.diagonal(block) for block in self.hessian(tensor)])

    def random(self, size):
        x = self.rng.normal(size=(500, size)) @ self.rng.normal(size=(size, size))
        return (x.T @ x / 500).astype(np.float32)

    def output_sensitivity(self, tensor):
        return np.linspace(0.1, 2, len(WEIGHTS[tensor]), dtype=np.float32)


def predicted(known):
    return PredictedLosses(CONFIG, SOURCE, known, Calibrated(known, CONFIG))


def error(tensor, layout, known):
    ids = np.arange(len(WEIGHTS[tensor]))
    statistics = statistics_of(known.hessian(tensor), known.tokens)
    if tensor == EMBEDDING:
        statistics = Calibrated(known, CONFIG)(tensor)
        assert {*statistics.kinds.kind[::8]} == {2} and len({*statistics.kinds.kind}) > 1
    parts = layout.encode(tensor, WEIGHTS[tensor], statistics, ids)
    return layout.decode(parts, WEIGHTS[tensor].shape[1]) - WEIGHTS[tensor]


def outputs(delta, blocks):
    """The diagonal of ΔW H ΔWᵀ."""
    parts = np.split(delta, np.cumsum([len(block) for block in blocks])[:-1], axis=1)
    return sum(np.diag(p @ block @ p.T) for p, block in zip(parts, blocks, strict=True))


def shrunk(known, tensor):
    statistics = statistics_of(known.hessian(tensor), known.tokens)
    return [hessian.matrix for hessian in statistics.hessians]


@pytest.mark.parametrize("item", items_of(CONFIG, None)[1:], ids=lambda item: item.tensors[0])
def test_the_loss_of_linears_is_that_of_the_formula(item):
    known = Known()
    losses = predicted(known).of(item, LAYOUTS)
    for loss, layout in zip(losses, LAYOUTS, strict=True):
        wanted = 0.0
        for tensor in item.tensors:
            costs = outputs(error(tensor, layout, known), shrunk(known, tensor))
            wanted += 0.5 * float(known.output_sensitivity(tensor) @ costs)
        assert loss == pytest.approx(wanted, rel=1e-4)


def test_rows_of_the_head_cost_as_head_and_as_embedding():
    known, ids = Known(), np.array([900, 3, 512, 77])
    item = PlanItem((EMBEDDING,), (4, CONFIG.width), ids)
    losses = predicted(known).of(item, LAYOUTS)
    for loss, layout in zip(losses, LAYOUTS, strict=True):
        delta = error(EMBEDDING, layout, known)[ids]
        head = outputs(delta, shrunk(known, EMBEDDING)) @ known.row_sensitivity[ids]
        squares = (CONFIG.embedding_scale * delta) ** 2 @ known.lookup_sensitivity
        assert loss == pytest.approx(0.5 * (head + squares @ known.token_share[ids]), rel=1e-4)


def test_rows_count_by_what_the_same_errors_cost():
    known = Known()
    importance = predicted(known).row_importance()
    delta = np.random.default_rng(1).choice([-1, 1], (4000, CONFIG.width))
    for row in (0, 1, 500):
        head = outputs(delta, known.hessian(EMBEDDING)).mean()
        squares = CONFIG.embedding_scale**2 * known.lookup_sensitivity.sum()
        wanted = known.row_sensitivity[row] * head + known.token_share[row] * squares
        assert CONFIG.width * importance[row] == pytest.approx(wanted, rel=0.1)


def test_rows_of_a_quantized_tensor_do_not_depend_on_the_slab():
    name, ids = "layers.0.mlp_block.up_proj.weight", np.array([0, 1, 2, 40, 90, 91])
    groups = RowGroup(rows_text(ids), Affine(8, 32, True)), RowGroup(None, Affine(4, 32, True))
    plan = {name: Float("float32") for name in model_tensors(CONFIG)} | {name: Mixed(groups)}
    tensor = quantized(SOURCE, plan, no_statistics)[name]
    expected = decoded(WEIGHTS[name], plan[name])
    for start, stop in ((0, 96), (0, 1), (1, 50), (39, 42), (90, 96), (93, 94)):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


def divergences(original, other):
    p, q = (torch.from_numpy(x).double().log_softmax(-1).numpy() for x in (original, other))
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("name", ["not_by_32", "hawk", "one_head"])
def test_a_divergence_is_that_of_deepminds_model_and_its_error_that_of_sequences(name, monkeypatch):
    config, rng = ODD_CONFIGS[name], np.random.default_rng(1)
    monkeypatch.setattr("rgexport.planning.losses._SLAB_BYTES", 100 * 4 * config.width)
    weights = random_weights(config)
    others = {n: w + 0.02 * w.std() * rng.normal(size=w.shape) for n, w in weights.items()}
    others = {n: w.astype(np.float32) for n, w in others.items()}
    texts = [rng.integers(0, config.vocab_size, length) for length in (20, 7, 20)]
    models = [deepmind_model(config, w) for w in (weights, others)]
    wanted = [
        divergences(*(deepmind_logits(model, text[None])[0] for model in models)) for text in texts
    ]
    source, others = weight_source(weights), weight_source(others)
    measured = OriginalRun(config, source, texts).divergence(others)
    assert measured.tokens == 47
    assert measured.kl == pytest.approx(np.concatenate(wanted).mean(), rel=1e-3)
    texts = [texts[0], texts[2]]
    equal = OriginalRun(config, source, texts).divergence(others)
    means = [wanted[0].mean(), wanted[2].mean()]
    assert equal.error == pytest.approx(np.std(means, ddof=1) / 2**0.5, rel=1e-3)
    alone = OriginalRun(config, source, texts[:1]).divergence(others)
    assert math.isnan(alone.error)
