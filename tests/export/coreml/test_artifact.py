"""A package is opened: weights come back, and what was done to it or its manifest is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.coreml.package import model_file, weight_file
from rgexport.export.manifest import MANIFEST
from rgexport.export.manifest_reader import read_manifest
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
    tensor = artifact.tensor(UP)  # a palette is shared by 16 rows; slabs need not know
    slabs = [rows for _, rows in tensor.slabs(limit=5 * tensor.row_bytes)]
    assert len(slabs) == -(-tensor.shape[0] // 5)
    np.testing.assert_array_equal(np.concatenate(slabs), tensor.whole())


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


Fields = dict[str, Any]
LINEAR = "layers.0.temporal_block.linear_x.weight"


def rewrite(folder: Path, change: Callable[[Fields], Any]) -> None:
    path = folder / MANIFEST
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def store(name: str = LINEAR, **scheme: Any) -> Callable[[Fields], Any]:
    def change(fields: Fields) -> None:
        fields["plan"][name] = fields["tensors"][name]["scheme"] = scheme

    return change


def test_round_trip(exported):
    assert read_manifest(exported[0].path) == exported[0].manifest
    assert exported[0].manifest.exact and exported[0].manifest.compute == "fp16"


BROKEN: dict[str, tuple[Callable[[Fields], Any], str]] = {
    "no record": (lambda f: f.pop("coreml"), "coreml is missing"),
    "length": (lambda f: f["coreml"].update(prefill_length=1), "prefill_length is 1"),
    "logits": (lambda f: f["coreml"].update(all_logits=1), "all_logits is 1"),
    "state": (lambda f: f["coreml"].update(recurrent_state="ring"), "expected io or hilo"),
    "no hash": (lambda f: f["coreml"]["blobs"].pop(f"{LINEAR}.data"), f"{LINEAR}.data .*no hash"),
    "hash of nothing": (lambda f: f["coreml"]["blobs"].update(x="0" * 64), "x is not a part"),
    "short hash": (lambda f: f["coreml"]["blobs"].update({f"{LINEAR}.data": "0"}), "not a hash"),
    "precision": (lambda f: f.update(precision="q4_0"), "precision is 'q4_0'; .*pal4"),
    "no program": (lambda f: f["files"].pop(model_file()), "there is no model.mlpackage"),
    "foreign kind": (lambda f: f.update(kind="onnx"), "ONNX does not have"),
    "layout": (lambda f: f["states"][0].update(layout="heap"), "layout is 'heap'"),
    "another layout": (lambda f: f["states"][0].update(layout="hilo"), r"states.0.\.layout is"),
    "block": (
        store(kind="affine", bits=4, block=48, symmetric=True, scale="float16"),
        "int4/48 .* that Core ML does not have",
    ),
    "group": (
        store(kind="palette", bits=4, group=7, lut="float16"),
        "pal4/7 .* that Core ML does not have",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest(case, copied):
    change, complaint = BROKEN[case]
    rewrite(copied, change)
    with pytest.raises(RequestError, match=complaint) as caught:
        open_artifact(copied)  # a session goes by the manifest, which has no hash of its own
    assert MANIFEST in str(caught.value) and "\n" not in str(caught.value)
