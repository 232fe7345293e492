"""The file of weights: coremltools' own reader finds in it what was written."""

import hashlib
import struct

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.export.coreml.package import weight_file
from rgexport.export.coreml.parts import transform_of
from rgexport.export.coreml.segments import packages
from rgexport.export.coreml.storage import ALIGNMENT, Storage, blob_dtype
from rgexport.griffin.tensor import from_array
from rgexport.quantize.scheme import Affine, Float, Palette, Scheme

_BlobStorageReader = pytest.importorskip("coremltools.libmilstoragepython")._BlobStorageReader

STORED: dict[str, tuple[Scheme, dict[str, str]]] = {
    "layers.0.mlp_block.gate_proj.weight": (
        Affine(4, 32, True, scale="float16"),
        {"data": "int4", "scales": "float16"},
    ),
    "layers.0.mlp_block.up_proj.weight": (
        Affine(4, 32, False, scale="float16"),
        {"data": "uint4", "scales": "float16", "zero_points": "uint4"},
    ),
    "layers.0.mlp_block.down_proj.weight": (
        Affine(8, None, True, scale="float32"),
        {"data": "int8", "scales": "float32"},
    ),
    "layers.1.mlp_block.gate_proj.weight": (
        Affine(8, 32, False, scale="float16"),
        {"data": "uint8", "scales": "float16", "zero_points": "uint8"},
    ),
    "layers.1.mlp_block.up_proj.weight": (Palette(group=8), {"data": "uint4", "lut": "float16"}),
    "layers.1.mlp_block.down_proj.weight": (Float("float16"), {"data": "float16"}),
    "final_norm.weight": (Float("float32"), {"data": "float32"}),
    "layers.0.temporal_block.rg_lru.recurrent_param": (Float("float32"), {"data": "float32"}),
}
"""Name of a weight → its scheme, and MIL's dtype of each part."""
PLAN = {name: scheme for name, (scheme, _) in STORED.items()}
VECTORS = {"final_norm.weight", "layers.0.temporal_block.rg_lru.recurrent_param"}
_READERS = {"float16": "fp16", "float32": "float"}


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    shapes = {name: (24,) if name in VECTORS else (24, 64) for name in PLAN}
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def written(weights, folder):
    stored = Storage(PLAN, {n: array.shape for n, array in weights.items()}, packages(8, ()))
    hashes = stored.write(folder, {name: from_array(array) for name, array in weights.items()})
    return stored, hashes, folder / weight_file()


def test_coremltools_reads_every_blob(weights, tmp_path):
    stored, hashes, path = written(weights, tmp_path)
    assert path.stat().st_size == stored.size
    assert struct.unpack("<II", path.read_bytes()[:8]) == (len(hashes), 2)
    reader = _BlobStorageReader(str(path))
    for name, tensor in stored.tensors.items():
        read = {}
        for label, part in tensor.parts.items():
            assert part.offset % ALIGNMENT == 0
            dtype = blob_dtype(label, tensor)
            assert dtype == STORED[name][1][label]
            method = getattr(reader, f"read_{_READERS.get(dtype, dtype)}_data")
            items = np.array(method(part.offset - ALIGNMENT))
            read[label] = items.view(np.float16) if dtype == "float16" else items
        check(PLAN[name], read, transform_of(name).store(weights[name]))


def check(scheme, read, values):
    """What MIL's definitions make of the blobs is near the weights."""
    if isinstance(scheme, Float):
        np.testing.assert_allclose(read["data"].reshape(values.shape), values, rtol=1e-3)
        return
    rows, columns = values.shape
    if isinstance(scheme, Palette):
        lut = read["lut"].reshape(rows // scheme.group, 16).astype(np.float32)
        indices = read["data"].reshape(len(lut), -1)
        restored, step = np.take_along_axis(lut, indices.astype(int), 1), 1.0
    else:
        scales = read["scales"].reshape(rows, -1, 1).astype(np.float32)
        zeros = read.get("zero_points", np.zeros(scales.size)).reshape(scales.shape)
        blocks = read["data"].reshape(rows, scales.shape[1], -1).astype(np.float32)
        restored, step = (blocks - zeros) * scales, np.abs(scales).max()
    np.testing.assert_allclose(restored.reshape(rows, columns), values, atol=1.05 * step, rtol=0)


def test_hashes_are_those_of_the_blobs(weights, tmp_path):
    stored, hashes, path = written(weights, tmp_path)
    data = path.read_bytes()
    found = {
        f"{name}.{label}": hashlib.sha256(data[part.offset : part.offset + part.nbytes])
        for name, tensor in stored.tensors.items()
        for label, part in tensor.parts.items()
    }
    assert hashes == {blob: digest.hexdigest() for blob, digest in found.items()}


def test_slabs_make_no_difference(weights, tmp_path, monkeypatch):
    _, hashes, path = written(weights, tmp_path / "whole")
    monkeypatch.setattr(storage, "SLAB_BYTES", 700)
    _, again, slabs = written(weights, tmp_path / "slabs")
    assert slabs.read_bytes() == path.read_bytes() and again == hashes


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.mlp_block.gate_proj.weight",
        "layers.0.mlp_block.up_proj.weight",
        "layers.1.mlp_block.up_proj.weight",
        "layers.1.mlp_block.down_proj.weight",
    ],
)
def test_a_weight_beyond_float16_is_named(name, weights, tmp_path):
    weights[name][3, 5] = 3e6
    with pytest.raises(RequestError, match=f"^{name}: (a weight|weights) of .* more than float16"):
        written(weights, tmp_path)
