"""The inputs and outputs of a graph, and what ONNX Runtime says when it opens the file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from rgexport.export.onnx.model_file import for_session
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.opening import open_artifact
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.sessions import distance, ragged, random_tokens

EARLIER = Path(__file__).with_name("earlier_layout")
CONFIG = ODD_CONFIGS["irregular"]
OPEN = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("profile", PROFILES)
def test_opening_a_file_prints_nothing(profile: str, precision: str, tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, precision, profile=profile)
    path = artifact.path / "model.onnx"
    opened = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, check=True)
    assert opened.stderr == b"" and opened.stdout == b""


@pytest.mark.parametrize("profile", PROFILES)
def test_the_graph_is_as_other_programs_take_it(profile: str, tmp_path: Path) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, None, profile=profile)
    path = artifact.path / "model.onnx"

    session = onnxruntime.InferenceSession(str(path))
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "tokens"]
    ring = ["batch_size", 1, CONFIG.window, CONFIG.head_dim]
    assert shapes["past_key_values.1.key"] == shapes["past_key_values.2.value"] == ring
    assert shapes["past_key_values.0.recurrent_state"] == ["batch_size", CONFIG.lru_width]
    assert session.get_outputs()[0].shape == ["batch_size", 1, CONFIG.vocab_size]

    graph = {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}
    io = artifact.manifest.io
    assert graph == {v.name: list(v.shape) for v in (*io.inputs, *io.outputs)}

    model = onnx.load(path, load_external_data=False)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["rgexport.block_types"] == "recurrent,attention,attention,recurrent"
    assert facts["rgexport.window"] == str(CONFIG.window)
    assert "Griffin" in model.doc_string


def test_files_of_the_earlier_layout_still_run() -> None:
    """Their rings have no axis for the head, and `num_logits` is an input with a default."""
    artifact = open_artifact(EARLIER)
    graph = onnxruntime.InferenceSession(str(artifact.path / "model.onnx"))
    shapes = {value.name: value.shape for value in graph.get_inputs()}
    config = artifact.manifest.config
    assert shapes["past_key_values.1.key"] == ["batch", config.window, config.head_dim]
    assert [value.name for value in graph.get_overridable_initializers()] == ["num_logits"]

    tokens = random_tokens(config, 2, 3 * config.window)
    weights = {name: tensor.whole() for name, tensor in artifact.weights.items()}
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for native in (True, False):
        session = OrtSession(artifact, native=native)
        session.reset(2)
        assert distance(ragged(session, tokens, [5, config.window + 3, 1]), expected) <= 1e-4
        saved = session.get_state()
        assert saved["layers.1.key"].shape == (2, config.window, config.head_dim)
        session.set_state(saved)
        assert all(np.array_equal(x, saved[name]) for name, x in session.get_state().items())


@pytest.mark.parametrize("model", [b"", b"\xff\xff", b"\x3a\x02\x62\x00"])
def test_a_damaged_model_is_left_to_the_engine(model: bytes) -> None:
    assert isinstance(for_session(model), bytes)
