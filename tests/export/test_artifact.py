"""Opening artifacts, reading their weights back, and what is refused in manifests."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from rgexport.artifacts.artifact import Artifact, record_files, remember_verified
from rgexport.artifacts.manifest import MANIFEST, NOT_ASKED_FOR, CheckRecord, write_manifest
from rgexport.artifacts.manifest_reader import read_manifest
from rgexport.artifacts.opening import open_artifact
from rgexport.artifacts.storage import groups_of
from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.export.storage import in_order
from rgexport.files import hashing
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize.schemes.registry import Mixed
from tests.models import ODD_CONFIGS, Weights, random_weights, write_hugging_face
from tests.row_groups import BIASED, decoded, split_plan

BITS = {"embedding": 8, "linear": 4}


def test_every_weight_comes_back(made):
    artifact = open_artifact(made.folder)
    assert list(artifact.weights) == list(made.weights)
    for name, spec in model_tensors(made.manifest.config).items():
        tensor, original = artifact.weights[name], made.weights[name]
        restored = tensor.whole()
        assert restored.shape == spec.shape and restored.dtype == np.float32
        # Half a step of rounding, and the other half for the rounded zero point.
        step = np.ptp(original) / (2 ** BITS[spec.role] - 1) if spec.role in BITS else 0
        np.testing.assert_allclose(restored, original, atol=1.05 * step, rtol=0)
        slabs = [rows for _, rows in tensor.slabs(limit=3 * tensor.row_bytes)]
        assert len(slabs) == -(-len(restored) // 3)
        np.testing.assert_array_equal(np.concatenate(slabs), restored)
    with pytest.raises(RequestError, match="has no tensor 'lm_head"):
        artifact.tensor("lm_head.weight")


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
    with pytest.raises(RequestError, match=f"plan is damaged: {name} {complaint}(?!.*\n)"):
        open_artifact(made.folder)


def test_what_an_owner_may_do_is_noted(made, capsys):
    card = made.folder / "README.md"
    card.write_text("Mine.")
    files = made.manifest.files | record_files(made.folder, ["README.md"])
    write_manifest(made.folder, replace(made.manifest, files=files))
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
    monkeypatch.setattr(hashing, "hash_file", hash_file := Mock(side_effect=hashing.hash_file))
    open_artifact(made.folder)
    first = [call.args[0].name for call in hash_file.call_args_list]
    assert {"model.onnx", "model.onnx.data"} <= {*first} and len({*first}) == len(first)
    hash_file.reset_mock()
    os.utime(made.folder / "model.onnx")
    open_artifact(made.folder)
    assert [call.args[0].name for call in hash_file.call_args_list] == ["model.onnx"]


def test_the_exporter_saves_the_first_hashing_but_not_that_of_verify(made, monkeypatch):
    flip(made.folder / "model.onnx.data")
    remember_verified(made.folder, made.manifest)
    with monkeypatch.context() as patch:
        patch.setattr(hashing, "hash_file", None)
        assert open_artifact(made.folder).manifest == made.manifest
    with pytest.raises(RequestError, match=r"model.onnx.data was altered"):
        open_artifact(made.folder, verify=True)


def test_a_damaged_cache_counts_as_empty_and_one_that_cannot_be_written_is_left(
    made, tmp_path, monkeypatch
):
    cache = tmp_path / "cache" / "verified.json"
    cache.parent.mkdir(exist_ok=True)
    for content in (b'{"x": 1}', b"\xff", b"[" * 100_000):
        cache.write_bytes(content)
        open_artifact(made.folder)
        assert len(json.loads(cache.read_text())) >= 2
    monkeypatch.setenv("RGEXPORT_CACHE", str(cache / "below"))
    open_artifact(made.folder)


Fields = dict[str, Any]
LINEAR = "layers.0.temporal_block.linear_x.weight"


def test_it_comes_back_with_fields_that_are_missing_or_unknown(made):
    record = CheckRecord(status="unverified", reason="so", tokens=32, kl=0.5, engine="toy 1")
    write_manifest(made.folder, replace(made.manifest, check=record))
    assert read_manifest(made.folder) == replace(made.manifest, check=record)
    rewrite(made, lambda fields: (fields.pop("check"), fields.pop("profile"), fields.update(x=1)))
    assert read_manifest(made.folder) == made.manifest
    assert made.manifest.check == NOT_ASKED_FOR and made.manifest.profile == "cpu"


def rewrite(made, change: Callable[[Fields], Any]) -> None:
    path = made.folder / MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def part(fields: Fields) -> Fields:
    return fields["tensors"][LINEAR]["parts"]["scales"]


def rename_file(new: str) -> Callable[[Fields], Any]:
    return lambda fields: fields["files"].update({new: fields["files"]["model.onnx"]})


def store_as_ggml(fields: Fields) -> None:
    scheme = {"kind": "ggml", "type": "q4_0"}
    fields["plan"][LINEAR] = fields["tensors"][LINEAR]["scheme"] = scheme


BROKEN: dict[str, tuple[Callable[[Fields], Any], str]] = {
    "newer": (lambda f: f.update(format_version=2), "format version 2.*update rgexport"),
    "foreign": (lambda f: f.update(kind="car"), "is not the manifest"),
    "no name": (lambda f: f.pop("name"), "name is missing"),
    "profile": (lambda f: f.update(profile="phone"), "profile is 'phone'; expected"),
    "precision": (lambda f: f.update(precision="int7"), "precision is 'int7'; expected fp32 or"),
    "zero": (lambda f: f["config"].update(lru_heads=0), "config.lru_heads is 0"),
    "scheme": (lambda f: f["plan"][LINEAR].update(bits=7), "bits is 7; expected 2 or 3"),
    "ggml": (store_as_ggml, "only GGUF files have ggml types"),
    "plan": (lambda f: f["plan"].pop(LINEAR), "not stored as the plan says"),
    "extra": (lambda f: f["tensors"].update(x=f["tensors"][LINEAR]), "tensors.x has shape"),
    "outside": (lambda f: part(f).update(offset=10**9), "lies outside of 'model.onnx.data'"),
    "rows": (lambda f: part(f).update(shape=[3, 1]), r"parts are .*\(3, 1\).*expected"),
    "escape": (rename_file("../secret"), "is no plain path within the artifact"),
    "check": (lambda f: f["check"].update(status="fine"), "check.status is 'fine'; expected"),
    "hash": (lambda f: f["files"]["model.onnx"].update(sha256=""), "not a hash and size"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest(made, case):
    change, complaint = BROKEN[case]
    rewrite(made, change)
    with pytest.raises(RequestError, match=complaint) as caught:
        read_manifest(made.folder)
    assert MANIFEST in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"a": NaN}'])
def test_not_a_manifest(made, text):
    (made.folder / MANIFEST).write_text(text)
    with pytest.raises(RequestError, match=MANIFEST):
        read_manifest(made.folder)


GROUPED = ODD_CONFIGS["not_by_32"]
PLAN = split_plan(GROUPED)


def test_results_come_in_order_and_few_are_in_flight():
    begun = 0

    def jobs():
        nonlocal begun
        for begun in range(100):
            yield lambda index=begun: (time.sleep(0.002 * (index % 3)), index)[1]

    for expected, result in enumerate(in_order(jobs())):
        assert result == expected and begun - result < 40
    assert result == 99

    def fail() -> int:
        raise RequestError("no")

    with pytest.raises(RequestError, match="no"):
        list(in_order([lambda: 1, fail, lambda: 2]))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> tuple[Artifact, Weights]:
    """An artifact with row groups, written in slabs; some slabs have no row of a group."""
    folder, weights = tmp_path_factory.mktemp("grouped"), random_weights(GROUPED)
    model = write_hugging_face(GROUPED, weights, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "SLAB_BYTES", 3 * 4 * GROUPED.width)
        target = export_onnx(open_checkpoint(model), OnnxOptions(plan=PLAN), folder / "grouped")
    return open_artifact(target), weights


@pytest.mark.parametrize("name", [EMBEDDING, BIASED])
def test_row_groups_come_back_in_their_order(name, grouped):
    artifact, weights = grouped
    scheme, tensor = PLAN[name], artifact.tensor(name)
    assert isinstance(scheme, Mixed)
    expected = decoded(weights[name], scheme)
    np.testing.assert_array_equal(tensor.whole(), expected)
    for start, stop in [(0, 1), (4, 5), (2, 9), (17, 17), (40, len(expected))]:
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
    manifest = artifact.manifest
    sizes = [group.stored.shape[0] for group in groups_of(manifest.tensors[EMBEDDING])]
    assert sizes == [20, 30, 51] and read_manifest(artifact.path) == manifest
    assert manifest.rounds_activations and manifest.precision == "int4"


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        (EMBEDDING, lambda s: s["groups"][0].update(rows="0-100"), "two row groups"),
        (EMBEDDING, lambda s: s["groups"][0].update(rows="101"), "row 101; expected rows below"),
        (EMBEDDING, lambda s: s["groups"][2]["scheme"].update(block=None), "does not have"),
        (EMBEDDING, lambda s: s["groups"].pop(1), "parts are"),
        ("final_norm.weight", lambda s: None, "only matrices are quantized"),
    ],
)
def test_row_groups_that_contradict_themselves(name, change, complaint, grouped, tmp_path):
    folder = Path(shutil.copytree(grouped[0].path, tmp_path / "copy"))
    fields = json.loads((folder / MANIFEST).read_text())
    scheme = fields["plan"][EMBEDDING]
    change(scheme)
    fields["plan"][name] = fields["tensors"][name]["scheme"] = scheme
    (folder / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(RequestError, match=complaint):
        read_manifest(folder)
