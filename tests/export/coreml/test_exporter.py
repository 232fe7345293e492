"""An exported folder and its program, what Xcode shows of it, and what is refused of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rgexport._version import __version__
from rgexport.artifacts.coreml.package import model_file, weight_file
from rgexport.artifacts.manifest import MANIFEST
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.griffin.checkpoint import open_checkpoint
from tests.artifacts import export_random_coreml
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=64, heads=2, lru_width=96, mlp_width=128, vocab_size=64, window=8)
LINEAR = "layers.0.temporal_block.linear_x.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An int4 package with an int8 embedding, and the weights that went into it."""
    return export_random_coreml(CONFIG, tmp_path_factory.mktemp("coreml"), "int4", prefill_length=5)


@pytest.fixture
def copied(exported, tmp_path):
    return Path(shutil.copytree(exported[0].path, tmp_path / "copy"))


@pytest.fixture
def model(tmp_path):
    """A checkpoint of the name of a released model."""
    folder = tmp_path / "recurrentgemma-2b-it"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder)


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def description(artifact):
    from coremltools.proto.Model_pb2 import Model

    return Model.FromString((artifact.path / model_file()).read_bytes()).description


def test_the_same_request_gives_the_same_bytes(model, tmp_path):
    options = CoreMLOptions(precision="pal4", prefill_length=3)
    one, other = (export_coreml(open_checkpoint(model), options, tmp_path / name) for name in "ab")
    files = files_of(one)
    package = {model_file(), "model.mlpackage/Manifest.json", weight_file()}
    assert set(files) == package | {MANIFEST, "README.md"}
    for name, path in files.items():
        assert path.read_bytes() == files_of(other)[name].read_bytes(), name
    artifact = open_artifact(one)
    assert set(artifact.manifest.files) == files.keys() - {MANIFEST}
    assert {"torch", "coremltools", "numpy", "rgexport"} <= artifact.manifest.created_with.keys()
    metadata = description(artifact).metadata
    assert metadata.author.startswith("Google") and "Gemma Terms of Use" in metadata.license


def test_command_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--precision", "pal4", "--prefill-length", "3", "--no-check"]
    assert run(["coreml", "-m", model.name, *asked]) == 0
    shown, name = capsys.readouterr(), f"{model.name}-pal4-coreml"
    assert shown.out.startswith(f"{name} is complete (") and shown.out.count("\n") == 1
    assert "has no tokenizer" in shown.err and "orch version" not in shown.err
    assert run(["inspect", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "coreml" and facts["precision"] == "pal4"
    expected = {"prefill_length": 3, "all_logits": False, "recurrent_state": "io", "split": []}
    assert facts["coreml"] == expected


def test_what_it_says_of_itself(exported):
    told = description(exported[0])
    summary = told.metadata.shortDescription
    assert summary.startswith("model, a RecurrentGemma (Griffin) language model")
    assert "int4 weights" in summary and "prefill for 5" in summary
    assert told.metadata.author == "Unknown (exported by rgexport)"
    assert told.metadata.license == "That of the checkpoint it was made from"
    assert told.metadata.versionString == __version__
    dtypes = {state.name.split(".")[2]: state.dtype for state in exported[0].manifest.states}
    assert dtypes == dict.fromkeys(("conv1d", "key", "value"), "float16") | {"rg_lru": "float32"}
    entries = told.metadata.userDefined
    assert json.loads(entries["rgexport.config"]) == exported[0].manifest.config.to_dict()
    assert len(told.functions) == 2
    for function in told.functions:
        features = [*function.input, *function.output, *function.state]
        texts = {feature.name: feature.shortDescription for feature in features}
        assert len(texts) >= 7 and all(texts.values())
        assert not any("None" in text or "{" in text for text in texts.values())
        assert texts["layers_1_key"].startswith("Layer 1: the last 8 keys")
        assert texts["layers_0_conv1d"].startswith("Layer 0: the last 3 inputs")
        assert "the last token" in texts["logits"]
        assert "zeros at first" in texts["recurrent_state"]


def test_altered_weights(exported, copied):
    """Of many blobs the number is told; what stands between the blobs counts, too."""
    sound = (copied / weight_file()).read_bytes()
    data = bytearray(sound)
    for tensor in exported[0].manifest.tensors.values():
        for part in tensor.parts.values():
            data[part.offset] ^= 1
    (copied / weight_file()).write_bytes(data)
    with pytest.raises(RequestError, match=r"\.data.* more(?!.*\n)") as caught:
        open_artifact(copied)
    assert len(str(caught.value)) < 1000
    (copied / weight_file()).write_bytes(sound[:63] + b"x" + sound[64:])
    with pytest.raises(RequestError, match=r"weight.bin was altered(?!.*\.data)"):
        open_artifact(copied)


Fields = dict[str, Any]


def store(**scheme):
    def change(fields):
        fields["plan"][LINEAR] = fields["tensors"][LINEAR]["scheme"] = scheme

    return change


BLOCKS_OF_48 = store(kind="affine", bits=4, block=48, symmetric=True, scale="float16")
GROUPS_OF_7 = store(kind="palette", bits=4, group=7, lut="float16")
BROKEN = {
    "no record": (lambda f: f.pop("coreml"), "coreml is missing"),
    "length": (lambda f: f["coreml"].update(prefill_length=1), "prefill_length is 1"),
    "state": (lambda f: f["coreml"].update(recurrent_state="ring"), "expected 'io' or 'hilo'"),
    "no hash": (lambda f: f["coreml"]["blobs"].pop(f"{LINEAR}.data"), f"{LINEAR}.data .*no hash"),
    "hash of nothing": (lambda f: f["coreml"]["blobs"].update(x="0" * 64), "x is not a part"),
    "short hash": (lambda f: f["coreml"]["blobs"].update({f"{LINEAR}.data": "0"}), "not a hash"),
    "no program": (lambda f: f["files"].pop(model_file()), "there is no model.mlpackage"),
    "foreign kind": (lambda f: f.update(kind="onnx"), "ONNX does not have"),
    "another layout": (lambda f: f["states"][0].update(layout="hilo"), r"states.0.\.layout is"),
    "block": (BLOCKS_OF_48, "int4/48 .* that Core ML does not have"),
    "group": (GROUPS_OF_7, "pal4/7 .* that Core ML does not have"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest(case, copied):
    change, complaint = BROKEN[case]
    fields = json.loads((copied / MANIFEST).read_text())
    change(fields)
    (copied / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(RequestError, match=complaint) as caught:
        open_artifact(copied)  # a session goes by the manifest, which has no hash of its own
    assert MANIFEST in str(caught.value) and "\n" not in str(caught.value)
