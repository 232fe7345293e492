"""The folder that an export leaves, its package beside coremltools' own, and what Xcode shows."""

import json

import numpy as np
import pytest

from rgexport import __version__
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.coreml import exporter
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.package import (
    PACKAGE,
    manifest_file,
    model_file,
    weight_file,
    write_package,
)
from rgexport.export.manifest import MANIFEST
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from tests.artifacts import export_random_coreml
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)


@pytest.fixture
def model(tmp_path):
    return write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def test_what_is_in_the_folder(model, tmp_path):
    target = export_coreml(open_checkpoint(model), CoreMLOptions(), tmp_path / "out")
    expected = {MANIFEST, "README.md", model_file(), manifest_file(), weight_file()}
    assert set(files_of(target)) == expected
    manifest = open_artifact(target).manifest
    assert set(manifest.files) == expected - {MANIFEST}
    assert {"torch", "coremltools", "numpy", "rgexport"} <= manifest.created_with.keys()


def test_the_same_request_gives_the_same_bytes(model, tmp_path):
    options = CoreMLOptions(precision="pal4", prefill_length=3)
    made = [export_coreml(open_checkpoint(model), options, tmp_path / name) for name in "ab"]
    one, other = (files_of(folder) for folder in made)
    assert one.keys() == other.keys()
    for name, path in one.items():
        assert path.read_bytes() == other[name].read_bytes(), name


def test_command_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--precision", "pal4", "--prefill-length", "3", "--no-check"]
    assert run(["coreml", "-m", "model", *asked]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("model-pal4-coreml is complete (") and shown.out.count("\n") == 1
    assert "try: rgexport generate model-pal4-coreml --ids 2" in shown.out
    assert "Warning: model has no tokenizer" in shown.err and "orch version" not in shown.err

    assert run(["inspect", "model-pal4-coreml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "coreml" and found["precision"] == "pal4"
    expected = {"prefill_length": 3, "all_logits": False, "recurrent_state": "io", "split": []}
    assert found["coreml"] == expected
    assert run(["inspect", "model-pal4-coreml", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "Core ML" in shown and "prefill length" in shown and "All hashes were verified" in shown


def test_a_package_that_would_be_wrong_is_not_made(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "check_package", lambda *_: ["decode: a is not b"])
    with pytest.raises(RequestError, match=r"1 complaint.*decode: a is not b.*fault of rgexport"):
        export_coreml(open_checkpoint(model), CoreMLOptions(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def description(artifact):
    from coremltools.proto.Model_pb2 import Model

    model = Model()
    model.ParseFromString((artifact.path / model_file()).read_bytes())
    return model.description


def test_what_it_says_of_itself(exported):
    metadata = description(exported[0]).metadata
    assert metadata.shortDescription.startswith("model, a RecurrentGemma (Griffin) language model")
    assert (
        "int4 weights" in metadata.shortDescription and "prefill for 5" in metadata.shortDescription
    )
    assert metadata.author == "Unknown (exported by rgexport)"
    assert metadata.license == "That of the checkpoint it was made from"
    assert metadata.versionString == __version__
    own = metadata.userDefined
    assert own["rgexport.precision"] == "int4" and own["rgexport.compute"] == "fp16"
    assert json.loads(own["rgexport.config"]) == exported[0].manifest.config.to_dict()


@pytest.mark.parametrize(("precision", "state"), [("fp32", "hilo"), ("fp16", "io")])
def test_every_feature_is_explained(precision, state, tmp_path):
    artifact, _ = export_random_coreml(CONFIG, tmp_path, precision, recurrent_state=state)
    functions = description(artifact).functions
    assert len(functions) == 2
    for function in functions:
        features = [*function.input, *function.output, *function.state]
        assert len(features) >= 7
        texts = [feature.shortDescription for feature in features]
        assert all(texts) and len(set(texts)) == len(texts)
        assert not any("None" in text or "{" in text for text in texts)


def test_a_state_is_explained_with_its_layer(exported):
    help_of = {
        feature.name: feature.shortDescription
        for function in description(exported[0]).functions
        for feature in [*function.input, *function.output, *function.state]
    }
    assert help_of["layers_2_key"].startswith("Layer 2: the last 8 keys")
    assert help_of["layers_0_conv1d"].startswith("Layer 0: the last 3 inputs")
    assert "the last token" in help_of["logits"]
    assert "zeros at first" in help_of["recurrent_state"]


def test_released_models_carry_their_terms(tmp_path):
    model = tmp_path / "recurrentgemma-2b-it"
    write_hugging_face(CONFIG, random_weights(CONFIG), model)
    target = export_coreml(open_checkpoint(model), CoreMLOptions(), tmp_path / "out")
    metadata = description(open_artifact(target)).metadata
    assert metadata.author.startswith("Google") and "Gemma Terms of Use" in metadata.license


@pytest.fixture
def theirs(tmp_path):
    """A package of one linear, saved by coremltools."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 64))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.linear(x=x, weight=np.ones((64, 64), np.float32))

    target = ct.target.iOS18
    model = ct.convert(program, minimum_deployment_target=target, skip_model_load=True)
    model.save(str(tmp_path / "theirs" / PACKAGE))
    return model


def layout(folder):
    """Names of the files, and the package's manifest without its random identifiers."""
    manifest = json.loads((folder / manifest_file()).read_text())
    root = manifest.pop("rootModelIdentifier")
    entries = manifest.pop("itemInfoEntries")
    items = sorted(json.dumps(item, sort_keys=True) for item in entries.values())
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return files, manifest, items, entries[root]["name"]


def test_layout_is_coremltools_own(theirs, tmp_path):
    ours = tmp_path / "ours"
    write_package(ours, theirs.get_spec())
    weights = f"{PACKAGE}/Data/com.apple.CoreML/weights"
    (ours / weights).mkdir()
    (ours / weights / "weight.bin").touch()
    assert layout(ours) == layout(tmp_path / "theirs")
    assert (ours / model_file()).stat().st_size == len(theirs.get_spec().SerializeToString())
