"""The Python API: `rgexport.export_model` and others do what the commands do."""

import json
from pathlib import Path
from typing import get_type_hints

import pytest

import rgexport
from rgexport.api import EvaluationSettings, FormatOptions
from rgexport.cli import run
from rgexport.commands.exports import CoreMLArguments, GgufArguments, OnnxArguments
from rgexport.errors import RequestError
from rgexport.evaluation.pieces import EvaluationRequest
from tests.command_line import ROOT, tree

NOTEBOOK = ROOT / "docs" / "python.ipynb"


def test_dir_shows_the_api():
    assert dir(rgexport) == sorted(rgexport.__all__)
    assert all(callable(getattr(rgexport, n)) for n in rgexport.__all__ if n != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        rgexport.exprot  # noqa: B018


def test_options_are_those_of_the_commands():
    """The functions take each option of an export command that is not in the signature."""
    commands = OnnxArguments, CoreMLArguments, GgufArguments
    fields = {name for arguments in commands for name in get_type_hints(arguments)}
    assert FormatOptions.__annotations__.keys() == fields - {"checkpoint", "export", "int4", "int8"}
    of_suites = {*EvaluationRequest.__annotations__} - {"folder"}
    assert EvaluationSettings.__annotations__.keys() == of_suites


def test_an_export_is_that_of_the_command_line(tmp_path: Path, demo_artifact: Path):
    stages = []
    artifact = rgexport.export_model(
        "demo",
        output=tmp_path / "demo",
        precision="int4",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert artifact.manifest.check.status == "verified" and Path(artifact) == tmp_path / "demo"
    with rgexport.load(artifact) as model:
        assert repr(model) == f"<Model {artifact.path} in {model.info.title}>"
    assert repr(rgexport.open_checkpoint("demo")).startswith("<Checkpoint demo: ")
    same = "model.onnx", "model.onnx.data", "tokenizer.json"
    assert all(artifact.file(n).read_bytes() == (demo_artifact / n).read_bytes() for n in same)
    assert repr(artifact) == f"<OnnxArtifact {tmp_path / 'demo'}: int4, 8.64 MB, verified>"
    ends = {stage: (done, total) for stage, done, total in stages}
    assert "Writing the weights" in ends and all(done == total for done, total in ends.values())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "int5"}, "'int5'; expected one of fp32"),
        ({"format": "gguf", "precision": "int5"}, "'int5'; expected one of fp32"),
        ({"pure": True}, "pure is no option of exports to onnx; expected some of precision"),
        ({"format": "coreml", "split": "many"}, "^--split is 'many'; expected a number of bytes"),
        ({"precision": "int3"}, "'int3'; .* make a plan: rgexport quantize MODEL --bits"),
        ({"format": "gguf", "type": "q3"}, "unknown type 'q3'; .* make a plan: rgexport quantize"),
        ({"format": "mlx"}, "format is 'mlx'; expected one of onnx, coreml, gguf"),
        ({"calibration": "none"}, "none"),
        ({"output": "."}, "cannot write"),
        ({"cluster": "a"}, "^--cluster is for --quality best or --calibration; leave it out"),
    ],
)
def test_a_wrong_request_raises_an_error(tmp_path, monkeypatch, options, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=complaint):
        rgexport.export_model("demo", **options)
    assert not tree(tmp_path)


@pytest.mark.full
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Each cell, with a smaller calibration, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    assert run(["calibrate", "demo", "--tokens", "256", "--sampled", "0", "-q"]) == 0
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    shown = capsys.readouterr().out
    assert "Against demo: demo-int4" in shown and "bits per weight" in shown
    assert repr(names["result"]).startswith("<ValidationResult demo-int4: PASS, ")
    assert repr(names["evaluation"]).startswith("<Evaluation figures: Against demo")
    assert (tmp_path / "demo-plan" / "model.onnx").is_file()


def test_loading_is_told(demo_artifact):
    stages = []
    with rgexport.load(demo_artifact, progress=lambda *stage: stages.append(stage)) as model:
        assert repr(model) == f"<Model {demo_artifact} in {model.info.title}>"
    assert ("Loading demo", 1, 1) in stages


def test_wrong_evaluations_and_plans_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="suite is 'txt'; expected one of text, memory"):
        rgexport.evaluate_models(["demo"], suites=["txt"])
    with pytest.raises(RequestError, match="0 targets are given"):
        rgexport.quantize_model("demo")
    with pytest.raises(RequestError, match=r"^--bits is 1, which no plan reaches; expected 2\."):
        rgexport.quantize_model("demo", bits=1)  # before a calibration is made
    with pytest.raises(RequestError, match="artifact is a list; validate one at a time"):
        rgexport.validate_artifact(["demo"])
    assert not tree(tmp_path)
