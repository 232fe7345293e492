"""Which ops of a model are fused, and that the others stay."""

from collections import Counter
from pathlib import Path

import pytest

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.functions import DOMAIN
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.reference import Reference
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine, Float
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random, load_graph
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face
from tests.sessions import distance, ragged, random_tokens

CONFIG = ODD_CONFIGS["regular"]
RECURRENT, ATTENTION = 4, 1
LAYERS = RECURRENT + ATTENTION


def ops(artifact: Artifact) -> Counter:
    nodes = load_graph(artifact).graph.node
    return Counter(node.op_type for node in nodes if node.domain == DOMAIN)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_linears_of_one_input_are_one_op(precision: str, tmp_path: Path) -> None:
    found = ops(export_random(CONFIG, tmp_path, precision)[0])
    assert found["QuantLinear3"] == ATTENTION  # q, k, v
    assert found["QuantLinear2"] == RECURRENT + LAYERS  # linear_y, linear_x; gate, up
    assert found["QuantLinear"] == 2 * LAYERS + 1  # the last of each block; the head


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_gates_are_in_the_scan(precision: str, tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, precision)
    assert ops(artifact)["RgLruScan"] == RECURRENT
    scans = [n for n in load_graph(artifact).graph.node if n.op_type == "RgLruScan"]
    assert all("rg_lru.recurrent_gate_weight" in scan.input[3] for scan in scans)


def test_exact_activations_are_not_rounded_together(tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, "int4", exact=True)
    assert not [op for op in ops(artifact) if op.startswith("QuantLinear")]
    products = [n for n in load_graph(artifact).graph.node if n.op_type == "MatMulNBits"]
    assert len(products) > 3 * LAYERS


def test_only_linears_of_one_scheme_are_one_op(tmp_path: Path) -> None:
    """A plan may mix schemes."""
    four, eight = Affine(4, 32, symmetric=True), Affine(8, 32, symmetric=True)
    plan = make_plan(CONFIG, four, eight)
    plan["layers.2.temporal_block.k_proj.weight"] = eight
    plan["layers.0.temporal_block.linear_x.weight"] = Float("float32")
    plan["layers.1.mlp_block.up_proj.weight"] = Affine(4, 32, symmetric=False)
    plan["layers.3.mlp_block.up_proj.weight"] = Affine(4, 64, symmetric=True)
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
    made = export_onnx(open_checkpoint(model), OnnxOptions(plan=plan), tmp_path / "mixed")
    artifact = open_artifact(made)
    found = ops(artifact)
    assert found["QuantLinear3"] == 0
    assert found["QuantLinear2"] == RECURRENT + LAYERS + 1 - 3  # q with v; not in layers 0, 1, 3
    assert found["QuantLinear"] == 2 * LAYERS + 1 + 1 + 1 + 4
    session = OrtSession(artifact)
    tokens = random_tokens(CONFIG, 1, 40)
    dequantized = Reference(CONFIG, artifact.weights)
    expected = dequantized.logits(dequantized.run(tokens)[0])
    for sizes in ([40], [1]):
        session.reset()
        assert distance(ragged(session, tokens, sizes), expected) < 0.05
