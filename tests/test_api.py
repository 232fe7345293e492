"""The Python API: `rgexport.export` and others do what the commands do."""

from pathlib import Path
from typing import get_type_hints

import pytest

import rgexport
from rgexport.api import FormatOptions
from rgexport.commands.exports import CoreMLArguments, GgufArguments, OnnxArguments
from rgexport.errors import RequestError
from tests.command_line import tree


def test_dir_shows_the_api():
    assert {*rgexport.__all__} <= {*dir(rgexport)}
    assert all(callable(getattr(rgexport, name)) for name in rgexport.__all__[1:])
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        rgexport.exprot  # noqa: B018


def test_options_are_those_of_the_commands():
    """The functions take each option of an export command that is not in the signature."""
    commands = OnnxArguments, CoreMLArguments, GgufArguments
    fields = {name for arguments in commands for name in get_type_hints(arguments)}
    assert FormatOptions.__annotations__.keys() == fields - {"checkpoint", "export", "int4", "int8"}


def test_an_export_is_that_of_the_command_line(tmp_path: Path, demo_artifact: Path):
    stages = []
    artifact = rgexport.export(
        "demo",
        output=tmp_path / "demo",
        precision="int4",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert artifact.manifest.check.status == "verified"
    same = "model.onnx", "model.onnx.data", "tokenizer.json"
    assert all(artifact.file(n).read_bytes() == (demo_artifact / n).read_bytes() for n in same)
    assert repr(artifact) == f"<OnnxArtifact {tmp_path / 'demo'}: int4, 8.80 MB, verified>"
    ends = {stage: (done, total) for stage, done, total in stages}
    assert "Writing the weights" in ends and all(done == total for done, total in ends.values())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "int5"}, "'int5'; expected one of fp32"),
        ({"format": "gguf", "precision": "int5"}, "'int5'; expected one of fp32"),
        ({"pure": True}, "pure is no option of exports to onnx; expected some of precision"),
        ({"format": "coreml", "split": "many"}, "--split is 'many'; expected a number of bytes"),
        ({"format": "mlx"}, "format is 'mlx'; expected one of onnx, coreml, gguf"),
        ({"calibration": "none"}, "none"),
        ({"output": "."}, "cannot write"),
    ],
)
def test_a_wrong_request_raises_an_error(tmp_path, monkeypatch, options, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=complaint):
        rgexport.export("demo", **options)
    assert not tree(tmp_path)
