"""A format that only the registry knows: every command works with it."""

import json
from pathlib import Path

import pytest

from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import open_checkpoint
from tests.models import make_config, random_weights, write_hugging_face
from tests.toy_format import FLOORS, KIND, export_toy

CONFIG = make_config("ra", width=32, heads=2, lru_width=48, vocab_size=300)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FORMATS, KIND, FLOORS)
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
    return export_toy(open_checkpoint(model), tmp_path / "toy")


def test_commands_take_it(artifact, tmp_path, capsys):
    assert open_artifact(artifact).manifest.check.status == "verified"
    assert "for a toy" in (artifact / "README.md").read_text()
    result = tmp_path / "result.json"
    model = str(tmp_path / "model")
    assert run(["validate", str(artifact), "-m", model, "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["verdict"] == "PASS" and found["artifact"]["kind"] == KIND
    assert found["sites"] is None and "does not show its values" in capsys.readouterr().err
    assert run(["inspect", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == KIND
    assert run(["generate", str(artifact), "--ids", "2", "-n", "3", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
