"""A package is opened: weights come back, and what was done to it is named."""

import hashlib
import json
import os

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.coreml.package import MODEL_FILE, WEIGHT_FILE
from rgexport.export.manifest import MANIFEST
from rgexport.export.opening import open_artifact
from rgexport.griffin.layout import model_tensors
from tests.artifacts import export_random_coreml
from tests.export.coreml.conftest import CONFIG

UP, GATE = (f"layers.1.mlp_block.{name}_proj.weight" for name in ("up", "gate"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "pal4"])
def test_every_weight_comes_back(precision, tmp_path):
    artifact, weights = export_random_coreml(CONFIG, tmp_path, precision)
    worst = {"fp32": 1e-6, "fp16": 6e-4, "int8": 0.02, "int4": 0.15, "pal4": 0.15}[precision]
    for name in model_tensors(CONFIG):
        restored, original = artifact.tensor(name).whole(), weights[name]
        assert restored.dtype == np.float32 and restored.shape == original.shape
        error = np.linalg.norm(restored - original) / np.linalg.norm(original)
        assert error < worst, name
        if artifact.manifest.compute == "fp16" and artifact.manifest.plan[name].kind != "float":
            assert (restored == restored.astype(np.float16)).all(), name


@pytest.mark.parametrize("precision", ["int4", "pal4"])
def test_slabs_are_the_whole(precision, tmp_path):
    """A palette is shared by 16 rows; slabs need not know."""
    artifact, _ = export_random_coreml(CONFIG, tmp_path, precision)
    tensor = artifact.tensor(UP)
    whole = tensor.whole()
    slabs = [rows for _, rows in tensor.slabs(limit=5 * tensor.row_bytes)]
    assert len(slabs) == -(-tensor.shape[0] // 5)
    np.testing.assert_array_equal(np.concatenate(slabs), whole)


def swap(path, one, other):
    """Exchanges the bytes of two parts."""
    data = bytearray(path.read_bytes())
    a, b = (slice(part.offset, part.offset + part.nbytes) for part in (one, other))
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)


def complaint(folder):
    with pytest.raises(RequestError) as caught:
        open_artifact(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_swapped_blobs_are_named(exported, copied):
    parts = [exported[0].manifest.tensors[name].parts["data"] for name in (UP, GATE)]
    swap(copied / WEIGHT_FILE, *parts)
    line = complaint(copied)
    assert "weight.bin was altered (its hash differs); " in line
    assert f"{UP}.data" in line and f"{GATE}.data" in line and ".scales" not in line


def test_an_altered_scale_is_named(exported, copied):
    part = exported[0].manifest.tensors[UP].parts["scales"]
    data = bytearray((copied / WEIGHT_FILE).read_bytes())
    data[part.offset + 5] ^= 1
    (copied / WEIGHT_FILE).write_bytes(data)
    assert complaint(copied).count(f"{UP}.scales") == 1


def test_of_many_altered_blobs_the_number_is_told(exported, copied):
    first = exported[0].manifest.tensors["layers.0.mlp_block.up_proj.weight"].parts["data"]
    data = bytearray((copied / WEIGHT_FILE).read_bytes())
    for tensor in exported[0].manifest.tensors.values():
        for part in tensor.parts.values():
            if part.offset >= first.offset:
                data[part.offset] ^= 1
    (copied / WEIGHT_FILE).write_bytes(data)
    line = complaint(copied)
    assert "layers.0.mlp_block.up_proj.weight.data" in line and "more" in line
    assert len(line) < 1000


def test_what_stands_between_the_weights_counts_too(exported, copied):
    data = bytearray((copied / WEIGHT_FILE).read_bytes())
    data[63] ^= 1  # in the file's own header, where nothing is
    (copied / WEIGHT_FILE).write_bytes(data)
    line = complaint(copied)
    assert "weight.bin was altered" in line and ".data" not in line


def test_a_truncated_file_of_weights_is_named(copied):
    path = copied / WEIGHT_FILE
    os.truncate(path, path.stat().st_size - 100)
    line = complaint(copied)
    assert "final_norm" in line and "weight.bin has" in line


@pytest.mark.parametrize("name", [MODEL_FILE, WEIGHT_FILE, "model.mlpackage/Manifest.json"])
def test_a_missing_file_is_named(name, copied):
    (copied / name).unlink()
    assert f"{name} is missing" in complaint(copied)


def drop_state_write(message):
    """Takes the operation that writes the first layer's convolution out of `decode`."""
    (block,) = message.mlProgram.functions["decode"].block_specializations.values()
    writes = [op for op in block.operations if op.type == "write_state"]
    block.operations.remove(writes[0])
    return writes[0].inputs["input"].arguments[0].name


def test_a_dropped_state_write_is_named(copied):
    from coremltools.proto.Model_pb2 import Model

    path = copied / MODEL_FILE
    message = Model.FromString(path.read_bytes())
    state = drop_state_write(message)
    path.write_bytes(message.SerializeToString())
    line = complaint(copied)
    assert "decode" in line and state in line


def test_hashes_that_were_made_to_fit_do_not_hide_it(exported, copied):
    """Whoever also writes the file's new hash into the manifest is found by the blobs' own."""
    parts = [exported[0].manifest.tensors[name].parts["data"] for name in (UP, GATE)]
    swap(copied / WEIGHT_FILE, *parts)
    fields = json.loads((copied / MANIFEST).read_text())
    digest = hashlib.sha256((copied / WEIGHT_FILE).read_bytes()).hexdigest()
    fields["files"][WEIGHT_FILE]["sha256"] = digest
    (copied / MANIFEST).write_text(json.dumps(fields))
    for _ in range(2):  # the first look remembers the file's hash
        assert f"{UP}.data" in complaint(copied)


@pytest.mark.parametrize("field", ["input", "output", "layout"])
def test_states_that_the_manifest_misnames(field, copied):
    """A session goes by the manifest, which has no hash of its own."""
    fields = json.loads((copied / MANIFEST).read_text())
    fields["states"][0][field] = "hilo" if field == "layout" else "elsewhere"
    (copied / MANIFEST).write_text(json.dumps(fields))
    assert "rgexport.json has other states" in complaint(copied)


def test_types_are_inferred_until_they_were_found_to_be_right(copied, monkeypatch):
    """It takes coremltools, which takes seconds to load."""
    looked = []

    def check(function):
        looked.append(function.name)
        return iter(())

    monkeypatch.setattr("rgexport.export.mil.structure.check_operations", check)
    for options, functions in (
        ({}, ["decode", "prefill"]),
        ({}, []),
        ({"verify": True}, ["decode", "prefill"]),
    ):
        looked.clear()
        open_artifact(copied, **options)
        assert looked == functions
    (copied / MODEL_FILE).touch()
    looked.clear()
    open_artifact(copied)
    assert looked == ["decode", "prefill"]
