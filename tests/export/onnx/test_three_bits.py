"""Weights of 3 bits: stored as such, multiplied as 4 bits by kernels and by standard ops."""

from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.kernels.onnx.library import NO_NATIVE
from rgexport.quantize import affine
from rgexport.quantize.plan import make_plan
from rgexport.quantize.row_ranges import rows_text
from rgexport.quantize.scheme import Affine, Mixed, Plan, RowGroup
from rgexport.runtimes.onnx.session import OrtSession
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face
from tests.sessions import distance, random_tokens

pytestmark = pytest.mark.full
SCHEMES = [Affine(3, 32, True, scale="float16"), Affine(3, 16, True), Affine(3, 128, True)]
FOUR = Affine(4, 32, False, scale="float16")
NAMES = ["regular", "not_by_32", "hawk", "attention_only", "one_head"]


def plan_of(name: str, scheme: Affine, *, groups: bool = False) -> Plan:
    plan = make_plan(ODD_CONFIGS[name], scheme, scheme)
    if groups:
        rows = rows_text(np.arange(3, 40, 2))
        plan[EMBEDDING] = Mixed((RowGroup(rows, Affine(8, 32, True)), RowGroup(None, scheme)))
    return plan


def exported(name: str, plan: Plan, folder: Path, **options: bool) -> Artifact:
    model = write_hugging_face(
        ODD_CONFIGS[name], random_weights(ODD_CONFIGS[name]), folder / "model"
    )
    asked = OnnxOptions(plan=plan, **options)
    return open_artifact(export_onnx(open_checkpoint(model), asked, folder / "artifact"))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_weights(name, scheme, groups, tmp_path):
    """Of the linears, the embedding and the head, with standard ops."""
    artifact = exported(name, plan_of(name, scheme, groups=groups), tmp_path, exact=True)
    tokens = random_tokens(ODD_CONFIGS[name], 1, 20)
    reference = Reference(ODD_CONFIGS[name], artifact.weights)
    expected = reference.logits(reference.run(tokens)[0])
    # An artifact's weights with scales in float16 are read as float16.
    limit = 1e-3 if scheme.scale == "float16" else 1e-5
    assert distance(OrtSession(artifact).prefill(tokens, 20), expected) < limit


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, SCHEMES[0]) for name in NAMES), ("regular", FOUR)], ids=str
)
def test_kernels_and_standard_ops_agree(name, scheme, tmp_path, monkeypatch):
    """Both round activations, so they are only as near as that allows."""
    artifact = exported(name, plan_of(name, scheme, groups=True), tmp_path)
    tokens = random_tokens(ODD_CONFIGS[name], 1, 20)
    native = OrtSession(artifact).prefill(tokens, 20)
    monkeypatch.setenv(NO_NATIVE, "1")
    assert distance(native, OrtSession(artifact).prefill(tokens, 20)) < 0.05


def test_three_bits_are_stored(tmp_path):
    """By the byte, and the manifest says so."""
    scheme = SCHEMES[0]
    artifact = exported("regular", plan_of("regular", scheme), tmp_path)
    assert artifact.manifest.precision == "int3"
    stored = artifact.manifest.tensors[EMBEDDING]
    rows, columns = stored.shape
    assert sum(part.nbytes for part in stored.parts.values()) == rows * columns * 3.5 / 8
    weights = random_weights(ODD_CONFIGS["regular"])[EMBEDDING]
    expected = affine.decode(affine.encode(weights, scheme), scheme, columns)
    np.testing.assert_allclose(artifact.weights[EMBEDDING].whole(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("profile", "symmetric", "complaint"),
    [
        ("wasm", True, "which the profile wasm does not have; .* in 4, 8 bits"),
        ("webgpu", True, "which the profile webgpu does not have; .* in 4, 8 bits"),
        ("cpu", False, r"in 3, 4, 8 bits \(those of 3 are symmetric\)"),
    ],
)
def test_three_bits_that_are_refused(profile, symmetric, complaint):
    with pytest.raises(RequestError, match=complaint):
        OnnxOptions(plan=plan_of("regular", Affine(3, 32, symmetric)), profile=profile)
