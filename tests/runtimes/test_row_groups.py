"""Row groups in each engine and every profile: against DeepMind's model with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rgexport.export.mil.checks import check_without_manifest
from rgexport.export.mil.package import open_package
from rgexport.export.onnx.profiles import PROFILES
from rgexport.griffin.layout import EMBEDDING
from rgexport.runtimes.engine import open_session
from tests.artifacts import export_planned, export_planned_coreml, load_graph
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.row_groups import split_plan
from tests.sessions import distance, ragged, random_tokens

EXACT, HALF, ROUNDED = 1e-4, 2e-2, 0.2
"""Largest |Δlogit| as a share of the largest |logit|, of activations in float32, float16, int8."""
BY_CHUNK = {"prefill_length": 8, "all_logits": True}
EXPORTS: dict[str, Any] = {
    **{
        f"{profile}-{exact}": (export_planned, {"profile": profile, "exact": exact})
        for profile in PROFILES
        for exact in (True, False)
    },
    "coreml": (export_planned_coreml, BY_CHUNK),
}


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("name", ["not_by_32", "narrow_lru"])
def test_equals_deepmind(
    name: str, kind: str, compute: str, in_order: bool, tmp_path: Path
) -> None:
    """Groups that are mixed up and groups one after another; in chunks and in a batch."""
    config, (export, options) = ODD_CONFIGS[name], EXPORTS[kind]
    plan = split_plan(config, in_order=in_order, symmetric=kind.startswith("webgpu"))
    artifact, _ = export(config, tmp_path, plan, compute=compute, **options)
    weights = {name: tensor.whole() for name, tensor in artifact.weights.items()}
    tokens = random_tokens(config, 2, 2 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = open_session(artifact)
    limit = {"fp32": EXACT, "fp16": HALF if kind == "coreml" else ROUNDED}[compute]
    limit = ROUNDED if artifact.manifest.rounds_activations else limit
    for batch, sizes in [(2, [8, 1, config.window + 1, 3]), (1, [1])]:
        session.reset(batch)
        assert distance(ragged(session, tokens[:batch], sizes), expected[:batch]) <= limit


@pytest.mark.parametrize("in_order", [False, True])
def test_the_head_reads_the_bytes_of_the_lookup(in_order: bool, tmp_path: Path) -> None:
    """And no order is restored where groups are one after another."""
    config = ODD_CONFIGS["not_by_32"]
    artifact, _ = export_planned(config, tmp_path, split_plan(config, in_order=in_order))
    model = load_graph(artifact)
    onnx.checker.check_model(str(artifact.path / "model.onnx"), full_check=True)
    places = {
        tensor.name: tuple(e.value for e in tensor.external_data if e.key in ("offset", "length"))
        for tensor in model.graph.initializer
    }
    nodes = list(model.graph.node)
    heads = [n for n in nodes if n.op_type == "QuantLinear" and "embed_tokens" in n.input[1]]
    looked_up = {places.get(n.input[0]) for n in nodes if n.op_type == "Gather"}
    assert len(heads) == 3
    assert all(places[name] in looked_up for node in heads for name in node.input[1:4] if name)
    products = {
        n.output[0] for n in nodes if n.op_type == "Concat" and heads[0].output[0] in n.input
    }
    restored = [n for n in nodes if n.op_type == "Gather" and n.input[0] in products]
    assert len(products) == 1 and len(restored) == (0 if in_order else 1)


def test_groups_of_a_core_ml_package(tmp_path: Path) -> None:
    """Rows are within the levels of their own group; a byte that was altered is named."""
    config = ODD_CONFIGS["not_by_32"]
    artifact, weights = export_planned_coreml(config, tmp_path, split_plan(config), compute="fp32")
    original, whole = weights[EMBEDDING], artifact.tensor(EMBEDDING).whole()
    error = np.linalg.norm(whole - original, axis=1) / np.linalg.norm(original, axis=1)
    assert (error < 0.02).sum() == len(original) // 5 and error.max() < 0.2
    np.testing.assert_array_equal(artifact.tensor(EMBEDDING).read(13, 40), whole[13:40])
    package = open_package(artifact.path / "model.mlpackage")
    assert artifact.complaints(True) == [] and not list(check_without_manifest(package))
    parts = artifact.manifest.tensors[EMBEDDING].parts
    assert {"0.data", "1.zero_points", "2.scales"} <= parts.keys()
    with open(artifact.path / parts["1.data"].file, "r+b") as file:
        file.seek(parts["1.data"].offset + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    assert f"{EMBEDDING}.1.data was altered (its hash differs)" in artifact.complaints(True)
    without = list(check_without_manifest(package))
    assert without == ["embed_tokens_weight_1.data was altered (its hash differs)"]
