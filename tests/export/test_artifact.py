"""Opening artifacts, and reading their weights back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export import verified
from rgexport.export.artifact import record_files, remember_verified
from rgexport.export.manifest import write_manifest
from rgexport.export.opening import open_artifact
from rgexport.griffin.layout import model_tensors

BITS = {"embedding": 8, "linear": 4}


def test_every_weight_comes_back(made):
    weights = open_artifact(made.folder).weights
    assert list(weights) == list(made.weights)
    for name, spec in model_tensors(made.manifest.config).items():
        restored = weights[name].whole()
        assert restored.shape == spec.shape and restored.dtype == np.float32
        spread = np.ptp(made.weights[name])
        # Half a step of rounding, and the other half for the rounded zero point.
        step = spread / (2 ** BITS[spec.role] - 1) if spec.role in BITS else 0
        np.testing.assert_allclose(restored, made.weights[name], atol=1.05 * step, rtol=0)
        slabs = [rows for _, rows in weights[name].slabs(limit=3 * weights[name].row_bytes)]
        assert len(slabs) == -(-len(restored) // 3)
        np.testing.assert_array_equal(np.concatenate(slabs), restored)


def test_unknown_tensor(made):
    with pytest.raises(RequestError, match="has no tensor 'lm_head"):
        open_artifact(made.folder).tensor("lm_head.weight")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (truncate, "has .* bytes instead of"),
        (flip, "was altered"),
        (Path.unlink, "is missing"),
        (link_elsewhere, "is missing"),
    ],
)
def test_damage_is_named(made, name, harm, complaint):
    open_artifact(made.folder)
    harm(made.folder / name)
    with pytest.raises(RequestError, match=f"plan is damaged: {name} {complaint}") as caught:
        open_artifact(made.folder)
    assert "\n" not in str(caught.value)


def test_what_an_owner_may_do_is_noted(made, capsys):
    card = made.folder / "README.md"
    card.write_text("Mine.")
    files = made.manifest.files | record_files(made.folder, ["README.md"])
    write_manifest(made.folder, made.manifest.with_files(files))
    (made.folder / ".DS_Store").touch()
    open_artifact(made.folder)
    assert capsys.readouterr().err == ""

    card.write_text("Mine!")
    (made.folder / "adapter.bin").touch()
    open_artifact(made.folder, verify=True)
    said = "README.md was edited; adapter.bin was added."
    assert capsys.readouterr().err.endswith(f"has changed since it was exported: {said}\n")
    card.unlink()
    open_artifact(made.folder)
    assert "README.md was removed; adapter.bin was added" in capsys.readouterr().err


def test_files_are_hashed_once(made, monkeypatch):
    hashed = []
    compute = verified.hash_file

    def counted(path, *rest):
        hashed.append(path.name)
        return compute(path, *rest)

    monkeypatch.setattr(verified, "hash_file", counted)
    open_artifact(made.folder)
    first = sorted(hashed)
    assert {"model.onnx", "model.onnx.data"} <= {*first} and len({*first}) == len(first)
    open_artifact(made.folder)
    assert len(hashed) == len(first)
    os.utime(made.folder / "model.onnx")
    open_artifact(made.folder)
    assert hashed[len(first) :] == ["model.onnx"]
    hashed.clear()
    open_artifact(made.folder, verify=True)
    assert {*first} <= {*hashed}


def test_the_exporter_saves_the_first_hashing(made, monkeypatch):
    remember_verified(made.folder, made.manifest)
    monkeypatch.setattr(verified, "hash_file", None)
    assert open_artifact(made.folder).manifest == made.manifest


def test_verify_does_not_use_the_cache(made):
    path = made.folder / "model.onnx.data"
    flip(path)
    remember_verified(made.folder, made.manifest)
    open_artifact(made.folder)
    with pytest.raises(RequestError, match=r"model.onnx.data was altered"):
        open_artifact(made.folder, verify=True)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"x": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_cache_counts_as_empty(made, tmp_path, content):
    cache = tmp_path / "cache" / "verified.json"
    cache.parent.mkdir(exist_ok=True)
    cache.write_bytes(content)
    open_artifact(made.folder)
    assert len(json.loads(cache.read_text())) >= 2


def test_a_cache_that_cannot_be_written_is_left(made, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RGEXPORT_CACHE", str(tmp_path / "file" / "below"))
    open_artifact(made.folder)


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, Path.touch])
def test_not_an_artifact(tmp_path, make):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(RequestError, match=r"thing(?!.*\n)"):
        open_artifact(path)
