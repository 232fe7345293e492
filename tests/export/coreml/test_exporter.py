"""The folder that an export leaves, and that memory does not grow with the model."""

import json

import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.coreml import exporter
from rgexport.export.coreml.exporter import CoreMLOptions, export_coreml
from rgexport.export.coreml.package import manifest_file, model_file, weight_file
from rgexport.export.manifest import MANIFEST
from rgexport.export.onnx.exporter import OnnxOptions, export_onnx
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
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
    assert found["coreml"] == {
        "prefill_length": 3,
        "all_logits": False,
        "recurrent_state": "io",
        "split": [],
    }
    assert run(["inspect", "model-pal4-coreml", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "Core ML" in shown and "prefill length" in shown and "All hashes were verified" in shown


def test_a_plan_of_another_format_is_made_to_fit(model, tmp_path):
    asked = OnnxOptions(precision="int4")
    plan = open_artifact(export_onnx(open_checkpoint(model), asked, tmp_path / "onnx"))
    options = CoreMLOptions(plan=plan.manifest.plan)
    found = open_artifact(export_coreml(open_checkpoint(model), options, tmp_path / "coreml"))
    assert found.manifest.precision == "int4"


def test_a_package_that_would_be_wrong_is_not_made(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "check_package", lambda *_: ["decode: a is not b"])
    with pytest.raises(RequestError, match=r"1 complaint.*decode: a is not b.*fault of rgexport"):
        export_coreml(open_checkpoint(model), CoreMLOptions(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_artifacts_are_replaced(model, tmp_path):
    target = export_coreml(open_checkpoint(model), CoreMLOptions(), tmp_path / "out")
    with pytest.raises(RequestError, match="pass --force"):
        export_coreml(open_checkpoint(model), CoreMLOptions(), target)
    options = CoreMLOptions(precision="int8")
    export_coreml(open_checkpoint(model), options, target, force=True)
    assert open_artifact(target).manifest.precision == "int8"
