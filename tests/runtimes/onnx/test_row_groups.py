"""Row groups in ONNX Runtime, for every profile: against DeepMind's model with the same weights."""

from pathlib import Path

import onnx
import pytest

from rgexport.export.onnx.profiles import PROFILES
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_planned, load_graph
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.row_groups import split_plan
from tests.sessions import distance, ragged, random_tokens

EXACT, ROUNDED = 1e-4, 0.2
"""Largest |Δlogit| as a share of the largest |logit|, of activations in float32 and in int8."""


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", ["not_by_32", "narrow_lru"])
def test_equals_deepmind(
    name: str, profile: str, exact: bool, compute: str, in_order: bool, tmp_path: Path
) -> None:
    """Groups that are mixed up and groups one after another; in chunks and in a batch."""
    config = ODD_CONFIGS[name]
    plan = split_plan(config, in_order=in_order, symmetric=profile == "webgpu")
    artifact, _ = export_planned(
        config, tmp_path, plan, profile=profile, exact=exact, compute=compute
    )
    weights = {name: tensor.whole() for name, tensor in artifact.weights.items()}
    tokens = random_tokens(config, 2, 2 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = OrtSession(artifact)
    rounds = artifact.manifest.rounds_activations or compute == "fp16"
    for batch, sizes in [(2, [7, 1, config.window + 1, 3]), (1, [1])]:
        session.reset(batch)
        found = ragged(session, tokens[:batch], sizes)
        assert distance(found, expected[:batch]) <= (ROUNDED if rounds else EXACT)


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
