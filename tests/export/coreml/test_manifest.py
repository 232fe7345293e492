"""What is refused in the manifest of a package, beside what every manifest must be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.export.coreml.package import model_file
from rgexport.export.manifest import MANIFEST
from rgexport.export.manifest_reader import read_manifest

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
    "length is a word": (lambda f: f["coreml"].update(prefill_length="5"), "prefill_length is '5'"),
    "logits": (lambda f: f["coreml"].update(all_logits=1), "all_logits is 1"),
    "state": (lambda f: f["coreml"].update(recurrent_state="ring"), "expected io or hilo"),
    "no hash": (lambda f: f["coreml"]["blobs"].pop(f"{LINEAR}.data"), f"{LINEAR}.data .*no hash"),
    "hash of nothing": (lambda f: f["coreml"]["blobs"].update(x="0" * 64), "x is not a part"),
    "short hash": (lambda f: f["coreml"]["blobs"].update({f"{LINEAR}.data": "0"}), "not a hash"),
    "precision": (lambda f: f.update(precision="q4_0"), "precision is 'q4_0'; .*pal4"),
    "no program": (lambda f: f["files"].pop(model_file()), "there is no model.mlpackage"),
    "foreign kind": (lambda f: f.update(kind="onnx"), "ONNX does not have"),
    "layout": (lambda f: f["states"][0].update(layout="heap"), "layout is 'heap'"),
    "ggml": (store(kind="ggml", type="q4_0"), "only GGUF files have ggml types"),
    "block": (
        store(kind="affine", bits=4, block=48, symmetric=True, scale="float16"),
        "int4/48 .* that Core ML does not have",
    ),
    "group": (
        store(kind="palette", bits=4, group=7, lut="float16"),
        "pal4/7 .* that Core ML does not have",
    ),
    "other scheme": (store(kind="float", dtype="float16"), "parts are .*expected"),
    "vector": (
        store("final_norm.weight", kind="palette", bits=4, group=8, lut="float16"),
        "only matrices are quantized",
    ),
    "outside": (
        lambda f: f["tensors"][LINEAR]["parts"]["scales"].update(offset=10**9),
        "lies outside of",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_manifest(case, copied):
    change, complaint = BROKEN[case]
    rewrite(copied, change)
    with pytest.raises(RequestError, match=complaint) as caught:
        read_manifest(copied)
    assert MANIFEST in str(caught.value) and "\n" not in str(caught.value)
