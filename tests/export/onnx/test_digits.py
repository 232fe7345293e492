"""Which products round their activations in two digits, and what that is worth."""

from pathlib import Path

import pytest

from rgexport.export.artifact import Artifact
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx.library import NO_NATIVE, kernels
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_planned, export_random, load_graph
from tests.models import ODD_CONFIGS
from tests.row_groups import split_plan
from tests.sessions import distance, random_tokens

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
    linears = {
        name for name in weights if "_proj." in name or ".linear_" in name or name == EMBEDDING
    }
    expected = {
        name
        for name in linears
        if name.startswith("layers.0.") or "linear_out" in name or name == EMBEDDING
    }
    assert with_two(artifact) == expected and expected < linears


def test_only_the_head_has_eight_bits(tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, "int4", embedding_precision="int8")
    assert with_two(artifact) == {EMBEDDING}


def test_row_groups_of_eight_bits(tmp_path: Path) -> None:
    config = ODD_CONFIGS["not_by_32"]
    artifact, _ = export_planned(config, tmp_path, split_plan(config))
    assert with_two(artifact) == {f"{EMBEDDING}.0", "layers.0.mlp_block.up_proj.weight.0"}


@pytest.mark.parametrize(
    ("precision", "options"),
    [("int4", {}), ("int8", {"exact": True}), ("int8", {"profile": "wasm"})],
)
def test_no_product(precision: str, options: dict, tmp_path: Path) -> None:
    assert with_two(export_random(CONFIG, tmp_path, precision, **options)[0]) == set()


@pytest.mark.skipif(not kernels().ops, reason=kernels().reason)
def test_native_kernels_come_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the bodies, which have one digit."""
    artifact, _ = export_random(CONFIG, tmp_path, "int8")
    tokens = random_tokens(CONFIG, 1, 40)
    reference = Reference(CONFIG, artifact.weights)
    expected = reference.logits(reference.run(tokens)[0])
    native = distance(OrtSession(artifact).prefill(tokens, 40), expected)
    monkeypatch.setenv(NO_NATIVE, "1")
    body = distance(OrtSession(artifact).prefill(tokens, 40), expected)
    assert native < 0.8 * body
