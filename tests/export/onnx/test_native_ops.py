"""Which ops of a model are fused, and which products round their activations in two digits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.functions import DOMAIN
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx.library import NO_NATIVE, kernels
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine, Float
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_planned, export_random, load_graph
from tests.command_line import ROOT
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face
from tests.row_groups import split_plan
from tests.sessions import distance, ragged, random_tokens

CONFIG = ODD_CONFIGS["regular"]
RECURRENT, ATTENTION = 4, 1
LAYERS = RECURRENT + ATTENTION


def ops(artifact: Artifact) -> Counter:
    nodes = load_graph(artifact).graph.node
    return Counter(node.op_type for node in nodes if node.domain == DOMAIN)


@pytest.mark.parametrize(
    ("precision", "exact"), [("int8", False), ("int4", False), ("int4", True), ("fp16", False)]
)
def test_what_is_fused(precision: str, exact: bool, tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, precision, exact=exact)
    counts, nodes = ops(artifact), load_graph(artifact).graph.node
    scans = [node for node in nodes if node.op_type == "RgLruScan"]
    assert len(scans) == counts["RgLruScan"] == RECURRENT
    assert all("rg_lru.recurrent_gate_weight" in scan.input[3] for scan in scans)
    if exact or precision == "fp16":
        assert not [op for op in counts if op.startswith("QuantLinear")]
        assert exact == any(node.op_type == "MatMulNBits" for node in nodes)
    else:
        assert counts["QuantLinear3"] == ATTENTION  # q, k, v
        assert counts["QuantLinear2"] == RECURRENT + LAYERS  # linear_y, linear_x; gate, up
        assert counts["QuantLinear"] == 2 * LAYERS + 1  # the last of each block; the head


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


def with_two(artifact: Artifact) -> set[str]:
    """The weights of the products that have an attribute `digits`, which is 2."""
    found = set()
    for node in load_graph(artifact).graph.node:
        digits = [a.i for a in node.attribute if a.name == "digits"]
        assert digits in ([], [2])
        if digits:
            found |= {name.partition(".data")[0] for name in node.input if ".data" in name}
    return found


def test_weights_of_eight_bits(tmp_path: Path) -> None:
    artifact, weights = export_random(CONFIG, tmp_path, "int8")
    words = "_proj.weight", "linear_x.weight", "linear_y.weight", "linear_out.weight", EMBEDDING
    linears = {name for name in weights if name.endswith(words)}
    chosen = "layers.0.", EMBEDDING
    expected = {name for name in linears if name.startswith(chosen) or "linear_out" in name}
    assert with_two(artifact) == expected and expected < linears


def test_only_the_head_has_eight_bits(tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, "int4")
    assert with_two(artifact) == {EMBEDDING}


def test_row_groups_of_eight_bits(tmp_path: Path) -> None:
    config = ODD_CONFIGS["not_by_32"]
    artifact, _ = export_planned(config, tmp_path, split_plan(config))
    assert with_two(artifact) == {f"{EMBEDDING}.0", "layers.0.mlp_block.up_proj.weight.0"}


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int4", {"embedding_precision": "int4"}),
        ("int8", {"exact": True}),
        ("int8", {"profile": "wasm"}),
    ],
)
def test_no_product(precision: str, options: dict, tmp_path: Path) -> None:
    assert with_two(export_random(CONFIG, tmp_path, precision, **options)[0]) == set()


@pytest.mark.skipif(not kernels().ops, reason=kernels().reason)
def test_native_kernels_come_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the bodies, which have one digit, on a model whose sites differ as trained ones do."""
    demo = open_checkpoint(ROOT / "demo" / "model")
    asked = OnnxOptions(precision="int8", block_size=32)
    artifact = open_artifact(export_onnx(demo, asked, tmp_path / "demo"))
    tokens = random_tokens(demo.config, 1, 60)
    reference = Reference(demo.config, artifact.weights)
    expected = reference.logits(reference.run(tokens)[0])

    def error() -> float:
        found = OrtSession(artifact).prefill(tokens, tokens.shape[1])
        return float(np.sqrt(np.mean((found - expected) ** 2)))

    native = error()
    monkeypatch.setenv(NO_NATIVE, "1")
    assert native < 0.7 * error()
