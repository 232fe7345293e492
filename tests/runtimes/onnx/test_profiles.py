"""Artifacts for browsers, on a processor: against DeepMind's model with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from rgexport.errors import RequestError
from rgexport.export.onnx import wasm_ops
from rgexport.griffin.state import POSITION
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.sessions import distance, ragged, random_tokens

LIMITS = {
    ("wasm", "fp32"): 1e-4,
    ("wasm", "int4"): 1e-4,
    ("wasm", "int8"): 6e-4,
    ("webgpu", "fp32"): 1e-4,
    ("webgpu", "int4"): 1e-4,
    ("webgpu", "int8"): 1e-4,
}
"""Largest |Δlogit| as a share of the largest |logit|: of float32 activations, or in two digits of
int8, which are 1 / 64,516 of the largest of a row."""
NAMES = ["narrow_lru", "not_by_32", "attention_tail"]


@pytest.mark.parametrize(("profile", "precision"), LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_deepmind(name: str, profile: str, precision: str, tmp_path: Path) -> None:
    """In one go, step by step, and in pieces that end anywhere; a batch, and one."""
    config, limit = ODD_CONFIGS[name], LIMITS[profile, precision]
    artifact, _ = export_random(config, tmp_path, precision, profile=profile)
    weights = {name: tensor.read(0, tensor.shape[0]) for name, tensor in artifact.weights.items()}
    tokens = random_tokens(config, 2, 3 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = OrtSession(artifact)
    for batch in (2, 1):
        for sizes in ([tokens.shape[1]], [1], [7, 1, config.window + 1, 3]):
            session.reset(batch)
            assert distance(ragged(session, tokens[:batch], sizes), expected[:batch]) <= limit


@pytest.mark.parametrize("profile", ["wasm", "webgpu"])
def test_position_zero_forgets_the_state(profile: str, tmp_path: Path) -> None:
    """Any recurrent state: the decay is exactly 0 there, not only small."""
    config = ODD_CONFIGS["hawk"]
    artifact, _ = export_random(config, tmp_path, "int8", profile=profile)
    tokens = random_tokens(config, 1, 9)
    session = OrtSession(artifact)
    expected = session.prefill(tokens, 9)
    state = session.get_state() | {POSITION: np.zeros(1, np.int64)}
    for name, array in state.items():
        if name.endswith("rg_lru"):
            array[:] = 1e30
        elif name.endswith("conv1d"):
            array[:] = 0
    session.set_state(state)
    np.testing.assert_array_equal(session.prefill(tokens, 9), expected)


@pytest.mark.parametrize("asked", [{"precision": "int4"}, {"precision": "int8", "exact": True}])
def test_large_matrices_are_unpacked_in_pieces(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a product do not depend on each other."""
    config = ODD_CONFIGS["not_by_32"]
    tokens = random_tokens(config, 2, 20)
    found = []
    for size in (wasm_ops.PIECE, 1000):
        monkeypatch.setattr(wasm_ops, "PIECE", size)
        artifact, _ = export_random(config, tmp_path / str(size), profile="wasm", **asked)
        model = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)
        found.append(sum(node.op_type == "MatMulNBits" for node in model.graph.node))
        session = OrtSession(artifact)
        session.reset(2)
        found.append(session.prefill(tokens, 20))
    assert found[2] > 2 * found[0]
    np.testing.assert_allclose(found[3], found[1], rtol=0, atol=1e-5)


def test_far_positions(tmp_path: Path) -> None:
    """Slots of rings and masks come from float32 positions in `webgpu`."""
    config = ODD_CONFIGS["irregular"]
    found = {}
    for profile in ("cpu", "webgpu"):
        artifact, _ = export_random(config, tmp_path, "fp32", profile=profile)
        session = OrtSession(artifact)
        logits = []
        for start in (131_072 + 17, 1_000_003):
            session.reset()
            state = session.get_state() | {POSITION: np.array([start])}
            session.set_state(state)
            logits.append(ragged(session, random_tokens(config, 1, 3 * config.window), [5, 1, 30]))
        found[profile] = np.stack(logits)
    assert distance(found["webgpu"], found["cpu"]) <= 1e-5


def test_an_old_onnx_runtime_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = export_random(ODD_CONFIGS["hawk"], tmp_path, profile="webgpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    with pytest.raises(RequestError, match=r"needs ONNX Runtime 1\.25 or later; this is 1\.24\.4"):
        OrtSession(artifact)
