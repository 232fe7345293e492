import dataclasses
import shutil
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.export.manifest import Manifest
from rgexport.export.manifest_reader import read_manifest
from rgexport.griffin import checkpoint as checkpoints
from rgexport.validate import source
from rgexport.validate.source import find_original
from tests.deepmind import write_deepmind
from tests.models import random_weights


@pytest.fixture
def manifest(clean) -> Manifest:
    return read_manifest(clean("fp32"))


def named(manifest: Manifest, name: str) -> Manifest:
    return dataclasses.replace(manifest, source=dataclasses.replace(manifest.source, name=name))


def test_a_deepmind_file_takes_window_and_soft_cap_from_the_artifact(manifest, tmp_path):
    config = dataclasses.replace(manifest.config, window=24, soft_cap=5.0)
    file = write_deepmind(random_weights(config), tmp_path)
    made = dataclasses.replace(manifest, config=config)
    found = find_original(made, str(file))
    assert found.config_differences == ()


def test_the_demo_is_found(manifest, checkpoint, monkeypatch):
    demo = named(manifest, "demo")
    monkeypatch.setattr(checkpoints, "demo_folder", lambda: checkpoint)
    found = find_original(demo, None)
    assert found.same_files and found.config_differences == ()
    assert find_original(manifest, None) is None

    def missing() -> Path:
        raise RequestError("not bundled")

    monkeypatch.setattr(checkpoints, "demo_folder", missing)
    assert find_original(demo, None) is None


def test_a_released_model_is_found_in_the_hub_cache(manifest, checkpoint, monkeypatch):
    cache = {"google/recurrentgemma-2b-it": checkpoint}
    monkeypatch.setattr(source, "cached_model", cache.get)
    found = find_original(named(manifest, "recurrentgemma-2b-it"), None)
    assert found.same_files
    assert find_original(named(manifest, "recurrentgemma-9b"), None) is None


def test_a_demo_that_was_trained_anew_is_not_taken_for_the_original(
    manifest, checkpoint, tmp_path, monkeypatch
):
    other = tmp_path / "demo"
    shutil.copytree(checkpoint, other)
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(checkpoints, "demo_folder", lambda: other)
    assert find_original(named(manifest, "demo"), None) is None
    given = find_original(manifest, str(other))
    assert not given.same_files


def test_a_missing_or_damaged_model(manifest, checkpoint, tmp_path):
    with pytest.raises(RequestError, match="there is no"):
        find_original(manifest, str(tmp_path / "missing"))
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError):
        find_original(manifest, str(broken))
