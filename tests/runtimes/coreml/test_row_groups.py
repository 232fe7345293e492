"""Row groups in Core ML packages: against DeepMind's model with the same weights."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools")

from rgexport.export.mil.checks import check_without_manifest
from rgexport.export.mil.package import open_package
from rgexport.griffin.layout import EMBEDDING
from rgexport.runtimes.engine import open_session
from tests.artifacts import export_planned_coreml
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.row_groups import split_plan
from tests.sessions import distance, ragged, random_tokens

LIMITS = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest |Δlogit| as a share of the largest |logit|."""


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("compute", LIMITS)
@pytest.mark.parametrize("name", ["not_by_32", "narrow_lru"])
def test_equals_deepmind(name: str, compute: str, in_order: bool, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    plan = split_plan(config, in_order=in_order)
    artifact, _ = export_planned_coreml(
        config, tmp_path, plan, compute=compute, prefill_length=8, all_logits=True
    )
    weights = {name: tensor.whole() for name, tensor in artifact.weights.items()}
    tokens = random_tokens(config, 1, 2 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = open_session(artifact)
    found = ragged(session, tokens, [8, 1, 8, 3])
    assert distance(found, expected) <= LIMITS[compute]


def test_weights_are_those_of_the_plan(tmp_path: Path) -> None:
    """Rows of the original within the levels of their own group, and in their places."""
    config = ODD_CONFIGS["not_by_32"]
    plan = split_plan(config)
    artifact, weights = export_planned_coreml(config, tmp_path, plan, compute="fp32")
    tensor, original = artifact.tensor(EMBEDDING), weights[EMBEDDING]
    whole = tensor.whole()
    error = np.linalg.norm(whole - original, axis=1) / np.linalg.norm(original, axis=1)
    int8 = [row for row in range(len(original)) if error[row] < 0.02]
    assert len(int8) == len(original) // 5 and error.max() < 0.2
    np.testing.assert_array_equal(tensor.read(13, 40), whole[13:40])
    parts = artifact.manifest.tensors[EMBEDDING].parts
    assert {"0.data", "1.zero_points", "2.scales"} <= parts.keys()


def test_groups_are_checked_as_other_weights_are(tmp_path: Path) -> None:
    """With the manifest, and by the metadata without it; a byte that was altered is named."""
    config = ODD_CONFIGS["not_by_32"]
    artifact, _ = export_planned_coreml(config, tmp_path, split_plan(config), compute="fp32")
    package = open_package(artifact.path / "model.mlpackage")
    assert artifact.complaints(True) == [] and not list(check_without_manifest(package))
    part = artifact.manifest.tensors[EMBEDDING].parts["1.data"]
    with open(artifact.path / part.file, "r+b") as file:
        file.seek(part.offset + 5)
        byte = file.read(1)[0]
        file.seek(part.offset + 5)
        file.write(bytes([byte ^ 1]))
    complaints = artifact.complaints(True)
    assert f"{EMBEDDING}.1.data was altered (its hash differs)" in complaints
    without = list(check_without_manifest(package))
    assert without == ["embed_tokens_weight_1.data was altered (its hash differs)"]
