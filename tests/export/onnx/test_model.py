"""The ONNX file: valid, with one table for embedding and head, and as other programs take it."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from rgexport.export.onnx.model import _require_reads_before_writes
from rgexport.export.onnx.model_file import for_session
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.opening import open_artifact
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random, load_graph
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.sessions import distance, ragged, random_tokens


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["not_by_32", "hawk", "attention_only"])
@pytest.mark.parametrize("profile", PROFILES)
def test_file_passes_the_checker(profile: str, name: str, precision: str, tmp_path: Path) -> None:
    """With shape inference where onnx knows all ops."""
    blocks = {"block_size": 32} if precision in ("int4", "int8") and profile == "cpu" else {}
    artifact, _ = export_random(ODD_CONFIGS[name], tmp_path, precision, profile=profile, **blocks)
    onnx.checker.check_model(str(artifact.path / "model.onnx"), full_check=profile == "cpu")


@pytest.mark.parametrize("name", ["regular", "not_by_32"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_embedding_and_head_are_the_same_bytes(name: str, precision: str, tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS[name], tmp_path, precision, block_size=32)
    model = load_graph(artifact)
    places = {
        t.name: [e.value for e in t.external_data if e.key in ("offset", "length")]
        for t in model.graph.initializer
    }
    head = next(n for n in reversed(model.graph.node) if n.op_type == "QuantLinear")
    gathered = [n.input[0] for n in model.graph.node if n.op_type == "Gather"]
    shared = [name for name in head.input[1:4] if name]
    assert sorted(places[name] for name in gathered) == sorted(places[name] for name in shared)
    weights = artifact.manifest.tensors.values()
    stored = sum(part.nbytes for tensor in weights for part in tensor.parts.values())
    alignment = 4096 * sum(len(tensor.parts) for tensor in weights)
    assert stored <= (artifact.path / "model.onnx.data").stat().st_size < stored + alignment


def test_a_state_that_may_be_overwritten_before_it_is_read_is_refused() -> None:
    """The attention must read the ring before the new keys enter it."""
    ring = ir.Value(name="past", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    new = ir.Value(name="new", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    read = ir.node("Neg", [ring])
    in_order = ir.node("Add", [ring, read.outputs[0]])
    _require_reads_before_writes([(ring, in_order.outputs[0])])
    at_will = ir.node("Add", [ring, new])
    with pytest.raises(AssertionError, match="may read past too late"):
        _require_reads_before_writes([(ring, at_will.outputs[0])])


EARLIER = Path(__file__).with_name("earlier_layout")
CONFIG = ODD_CONFIGS["irregular"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("profile", PROFILES)
def test_opening_a_file_prints_nothing(
    profile: str, precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact, _ = export_random(CONFIG, tmp_path, precision, profile=profile)
    capfd.readouterr()
    onnxruntime.InferenceSession(str(artifact.path / "model.onnx"))
    assert capfd.readouterr() == ("", "")


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
    past = {name.removeprefix("past_key_values.") for name in shapes if name.startswith("past")}
    states = {value.name.removeprefix("present.") for value in session.get_outputs()[1:]}
    assert states == past and "0.conv_state" in past
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
