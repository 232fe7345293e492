"""The ONNX file: valid, with one table for embedding and head, and with standard names."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from rgexport.export.onnx.model import _require_reads_before_writes
from rgexport.export.onnx.profiles import PROFILES
from tests.artifacts import export_random, load_graph
from tests.models import ODD_CONFIGS


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


def test_names_are_those_of_other_hybrid_models(tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS["irregular"], tmp_path)
    model = load_graph(artifact)
    inputs = [value.name for value in model.graph.input]
    assert inputs[:2] == ["input_ids", "position_ids"]
    assert {"past_key_values.0.recurrent_state", "past_key_values.0.conv_state"} <= {*inputs}
    assert {"past_key_values.1.key", "past_key_values.1.value"} <= {*inputs}
    outputs = [value.name for value in model.graph.output]
    assert outputs[0] == "logits"
    past = {n.removeprefix("past_key_values.") for n in inputs if n.startswith("past")}
    assert past == {name.removeprefix("present.") for name in outputs[1:]}
    sites = {value for node in model.graph.node for value in node.output}
    assert "layers.2.temporal_block.q_proj" in sites


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
