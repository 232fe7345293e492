"""The ONNX file of each profile: its ops, its layout, and how other programs take it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from rgexport.artifacts.describe import as_text, describe
from rgexport.artifacts.manifest import COLUMNS
from rgexport.artifacts.onnx.trust import OPERATORS
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.export.onnx.functions import DOMAIN
from rgexport.export.onnx.profiles import PROFILES, FileLimit
from rgexport.griffin.layout import EMBEDDING, sites
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random, load_graph
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS
from tests.sessions import distance, ragged, random_tokens


def _walk(nodes: list[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    """Domain and name of every op, also in subgraphs."""
    for node in nodes:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            yield from _walk(attribute.g.node)


@pytest.mark.parametrize(
    ("name", "precision", "exact"),
    [
        *(("not_by_32", precision, False) for precision in ("fp32", "fp16", "int8", "int4")),
        ("attention_only", "int8", True),
        ("hawk", "int4", True),
    ],
)
@pytest.mark.parametrize("profile", PROFILES)
def test_files_are_valid_and_have_no_other_ops(profile, name, precision, exact, tmp_path, capfd):
    config = ODD_CONFIGS[name]
    artifact, _ = export_random(config, tmp_path, precision, profile=profile, exact=exact)
    path = str(artifact.path / "model.onnx")
    onnx.checker.check_model(path, full_check=profile == "cpu")  # onnx knows all ops of that
    capfd.readouterr()
    onnxruntime.InferenceSession(path)
    assert capfd.readouterr() == ("", "")
    allowed, model = OPERATORS[profile], load_graph(artifact)
    graphs = [model.graph, *model.functions]
    ops = {op for graph in graphs for op in _walk(graph.node)}
    assert all(name in allowed[domain] for domain, name in ops)
    assert (DOMAIN in {domain for domain, _ in ops}) is (profile == "cpu")
    names = {name for domain, name in ops if domain == ""}
    if profile == "webgpu":
        recurrent = "recurrent" in config.block_types
        assert (("com.microsoft", "LinearAttention") in ops) is recurrent
    rows = profile == "wasm" and precision in ("int8", "int4") and not exact
    assert ("MatMulInteger" in names) is rows, "in int4, too: the head is int8 there"
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"} & {name for _, name in ops}
    called = {name for domain, name in ops if domain == DOMAIN}
    assert called == {function.name for function in model.functions}
    assert artifact.manifest.profile == profile
    rounded = not exact if profile == "cpu" else "MatMulInteger" in names
    assert artifact.manifest.exact is not rounded


@pytest.mark.parametrize("profile", ["cpu", "webgpu"])
def test_the_graph_is_as_other_programs_take_it(profile: str, tmp_path: Path) -> None:
    """The observer and the bisection look for the names of sites."""
    config = ODD_CONFIGS["irregular"]
    artifact, _ = export_random(config, tmp_path, None, profile=profile)
    session = onnxruntime.InferenceSession(str(artifact.path / "model.onnx"))
    graph = {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}
    assert graph["input_ids"] == graph["position_ids"] == ["batch_size", "tokens"]
    ring = ["batch_size", 1, config.window, config.head_dim]
    assert graph["past_key_values.1.key"] == graph["past_key_values.2.value"] == ring
    assert graph["past_key_values.0.recurrent_state"] == ["batch_size", config.lru_width]
    assert graph["logits"] == ["batch_size", 1, config.vocab_size]
    past = {name.removeprefix("past_key_values.") for name in graph if name.startswith("past")}
    states = {value.name.removeprefix("present.") for value in session.get_outputs()[1:]}
    assert states == past and "0.conv_state" in past
    io = artifact.manifest.io
    assert graph == {v.name: list(v.shape) for v in (*io.inputs, *io.outputs)}

    model = load_graph(artifact)
    if profile == "webgpu":  # the kernels of the other profile do several sites at once
        assert set(sites(config)) <= {value for node in model.graph.node for value in node.output}
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["rgexport.block_types"] == "recurrent,attention,attention,recurrent"
    assert facts["rgexport.window"] == str(config.window)
    assert "Griffin" in model.doc_string


def test_files_of_the_earlier_layout_still_run() -> None:
    """Their rings have no axis for the head, and `num_logits` is an input with a default."""
    artifact = open_artifact(Path(__file__).with_name("earlier_layout"))
    config = artifact.manifest.config
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


def test_embedding_and_head_are_the_same_bytes(tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS["not_by_32"], tmp_path, "int4")
    weights = artifact.manifest.tensors.values()
    stored = sum(part.nbytes for tensor in weights for part in tensor.parts.values())
    alignment = 4096 * sum(len(tensor.parts) for tensor in weights)
    assert stored <= (artifact.path / "model.onnx.data").stat().st_size < stored + alignment


def test_int8_rows_are_stored_by_columns(tmp_path: Path) -> None:
    """One copy on disk for the embedding and the head."""
    artifact, weights = export_random(ODD_CONFIGS["not_by_32"], tmp_path, "int8", profile="wasm")
    words = ": onnx (wasm) artifact, int8 weights, fp32 activations (int8 in products),"
    assert words in as_text(describe(str(artifact.path)))
    tensors = artifact.manifest.tensors.items()
    by_columns = {name for name, stored in tensors if COLUMNS in stored.parts}
    assert EMBEDDING in by_columns and len(by_columns) > 3
    for name in by_columns:
        restored = artifact.tensor(name).whole()
        assert distance(restored, weights[name]) < 0.01
        np.testing.assert_array_equal(artifact.tensor(name).read(3, 5), restored[3:5])
    model = load_graph(artifact)
    head = next(n for n in reversed(model.graph.node) if n.op_type == "MatMulInteger")
    assert head.input[1] in {n.input[0] for n in model.graph.node if n.op_type == "Gather"}


def test_weights_are_in_files_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the embedding, which has a file of its own of a larger size at most."""
    limit, config = 4 * 4096, ODD_CONFIGS["regular"]
    files = FileLimit(filled=limit, largest=3 * limit)
    changed = dataclasses.replace(PROFILES["webgpu"], files=files)
    monkeypatch.setitem(PROFILES, "webgpu", changed)
    with pytest.raises(RequestError, match=r"embed_tokens\.weight takes 65,536 bytes as float32"):
        export_random(config, tmp_path, "fp32", profile="webgpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    artifact, weights = export_random(config, tmp_path, "int8", profile="webgpu")
    files, tensors = artifact.manifest.files, artifact.manifest.tensors
    sizes = {name: files[name].size for name in files if name.startswith("model.onnx.data")}
    first, *others = sizes
    assert {part.file for part in tensors[EMBEDDING].parts.values()} == {first}
    assert len(others) > 5 and max(sizes[name] for name in others) <= limit < sizes[first]
    for stored in tensors.values():
        assert len({part.file for part in stored.parts.values()}) == 1
    model = load_graph(artifact)
    assert sizes.keys() <= {e.value for t in model.graph.initializer for e in t.external_data}
    for tensor in (EMBEDDING, "layers.4.mlp_block.down_proj.weight"):
        restored = artifact.tensor(tensor).read(0, len(weights[tensor]))
        assert np.abs(restored - weights[tensor]).max() < 0.02 * np.abs(weights[tensor]).max()
