"""A package is opened: weights come back, and what was done to it is named."""

import json

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.coreml.package import manifest_file, weight_file
from rgexport.export.manifest import MANIFEST
from rgexport.export.opening import open_artifact
from rgexport.griffin.layout import model_tensors
from tests.artifacts import export_random_coreml
from tests.export.coreml.conftest import CONFIG

UP = "layers.1.mlp_block.up_proj.weight"


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


def complaint(folder):
    with pytest.raises(RequestError) as caught:
        open_artifact(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_of_many_altered_blobs_the_number_is_told(exported, copied):
    first = exported[0].manifest.tensors["layers.0.mlp_block.up_proj.weight"].parts["data"]
    data = bytearray((copied / weight_file()).read_bytes())
    for tensor in exported[0].manifest.tensors.values():
        for part in tensor.parts.values():
            if part.offset >= first.offset:
                data[part.offset] ^= 1
    (copied / weight_file()).write_bytes(data)
    line = complaint(copied)
    assert "layers.0.mlp_block.up_proj.weight.data" in line and "more" in line
    assert len(line) < 1000


def test_what_stands_between_the_weights_counts_too(exported, copied):
    data = bytearray((copied / weight_file()).read_bytes())
    data[63] ^= 1  # in the file's own header, where nothing is
    (copied / weight_file()).write_bytes(data)
    line = complaint(copied)
    assert "weight.bin was altered" in line and ".data" not in line


def test_a_missing_file_is_named(copied):
    (copied / manifest_file()).unlink()
    assert f"{manifest_file()} is missing" in complaint(copied)


@pytest.mark.parametrize("field", ["input", "output", "layout"])
def test_states_that_the_manifest_misnames(field, copied):
    """A session goes by the manifest, which has no hash of its own."""
    fields = json.loads((copied / MANIFEST).read_text())
    fields["states"][0][field] = "hilo" if field == "layout" else "elsewhere"
    (copied / MANIFEST).write_text(json.dumps(fields))
    assert f"rgexport.json is damaged: states[0].{field} is" in complaint(copied)
