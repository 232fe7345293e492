"""Which products round their activations in two digits, and what that is worth."""

from pathlib import Path

import numpy as np
import pytest

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx.library import NO_NATIVE, kernels
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_planned, export_random, load_graph
from tests.command_line import ROOT
from tests.models import ODD_CONFIGS
from tests.row_groups import split_plan
from tests.sessions import random_tokens

CONFIG = ODD_CONFIGS["regular"]


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
