"""Scales in float16: half of the bytes in the file, the same numbers in every product."""

from pathlib import Path

import pytest

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx.library import NO_NATIVE
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import load_graph
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face
from tests.sessions import distance, random_tokens

CONFIG = ODD_CONFIGS["regular"]
ROUNDED = 1e-3
"""Of weights to float16, which the reader of an artifact does where scales are float16."""


def exported(folder: Path, *, symmetric: bool, **options) -> Artifact:
    plan = make_plan(
        CONFIG,
        Affine(4, 32, symmetric, scale="float16"),
        Affine(8, 64, symmetric, scale="float16"),
    )
    model = write_hugging_face(CONFIG, random_weights(CONFIG), folder / "model")
    asked = OnnxOptions(plan=plan, **options)
    return open_artifact(export_onnx(open_checkpoint(model), asked, folder / "artifact"))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("profile", ["cpu", "wasm", "webgpu"])
def test_exact_products_are_those_of_the_weights(profile, symmetric, tmp_path):
    """Embedding, linears and head, with standard ops."""
    exact = {"exact": True} if profile == "cpu" else {}
    artifact = exported(tmp_path, symmetric=symmetric, profile=profile, **exact)
    stored = {t.data_type for t in load_graph(artifact).graph.initializer if ".scales" in t.name}
    assert len(stored) == 1
    tokens = random_tokens(CONFIG, 1, 20)
    reference = Reference(CONFIG, artifact.weights)
    expected = reference.logits(reference.run(tokens)[0])
    assert distance(OrtSession(artifact).prefill(tokens, 20), expected) < ROUNDED


@pytest.mark.parametrize("symmetric", [False, True])
def test_kernels_and_bodies_agree(symmetric, tmp_path, monkeypatch):
    """Both round activations, so they are only as near as that allows."""
    artifact = exported(tmp_path, symmetric=symmetric)
    tokens = random_tokens(CONFIG, 1, 20)
    native = OrtSession(artifact).prefill(tokens, 20)
    monkeypatch.setenv(NO_NATIVE, "1")
    assert distance(native, OrtSession(artifact).prefill(tokens, 20)) < 0.05
