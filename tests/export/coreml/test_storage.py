"""What is stored: coremltools' own reader and operations find in it what was written."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.artifacts.coreml.package import packages, weight_file
from rgexport.artifacts.coreml.storage import ALIGNMENT, decode, part_shapes
from rgexport.artifacts.manifest import StoredPart, StoredTensor
from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.export.coreml.storage import CoreMLStorage, blob_dtype, encode
from rgexport.griffin.tensor import from_array
from rgexport.quantize.algorithms.statistics import no_statistics
from rgexport.quantize.schemes.registry import Affine, Float, Palette, Parts, Scheme

pytest.importorskip("coremltools")

NAME = "layers.0.mlp_block.up_proj.weight"
DTYPES = ("float16", "float32")
forms = {"symmetric": st.booleans(), "scale": st.sampled_from(DTYPES)}
affines = st.builds(Affine, st.sampled_from([4, 8]), st.sampled_from([None, 8, 32]), **forms)
palettes = st.builds(Palette, group=st.sampled_from([1, 2, 16]), lut=st.sampled_from(DTYPES))
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-100, 100, width=32),
)


def stored_tensor(shape: tuple[int, ...], scheme: Scheme) -> StoredTensor:
    layouts = part_shapes(shape, scheme)
    return StoredTensor(shape, scheme, {k: StoredPart("f", 0, *v) for k, v in layouts.items()})


def integers(part: np.ndarray, bits: int, *, signed: bool) -> np.ndarray:
    """The numbers of a MIL blob: of 4 bits, the low nibble first, in two's complement if signed."""
    if bits == 8:
        return part.astype(np.float64)
    nibbles = np.stack([part & 15, part >> 4], -1).reshape(len(part), -1).astype(np.float64)
    return nibbles - 16 * (nibbles >= 8) if signed else nibbles


def as_core_ml(parts: dict[str, np.ndarray], scheme: Affine | Palette) -> np.ndarray:
    """What the constexpr operation gives."""
    from coremltools.converters.mil.mil.ops.defs.iOS18 import compression

    if isinstance(scheme, Palette):
        lut = parts["lut"][:, None, :, None]
        indices = integers(parts["data"], 4, signed=False).astype(np.uint8)
        return compression.constexpr_lut_to_dense.decompress(indices, lut, None)
    data = integers(parts["data"], scheme.bits, signed=scheme.symmetric)
    offset = None
    if not scheme.symmetric:
        offset = integers(parts["zero_points"], scheme.bits, signed=False)
        offset = offset.astype(scheme.scale)
    return compression.constexpr_blockwise_shift_scale.decompress(data, parts["scales"], offset)


def encoded(rows: np.ndarray, stored: StoredTensor, name: str = NAME) -> Parts:
    return encode(no_statistics, name, rows, np.arange(len(rows)), stored)


@settings(max_examples=150)
@given(matrices, st.one_of(affines, palettes))
def test_decoding_is_core_mls(rows: np.ndarray, asked: Affine | Palette) -> None:
    scheme = asked.fitted(rows.shape)
    assert isinstance(scheme, Affine | Palette)
    stored = stored_tensor(rows.shape, scheme)
    parts = encoded(rows, stored)
    layouts = {label: (part.dtype.name, part.shape) for label, part in parts.items()}
    assert layouts == part_shapes(rows.shape, scheme)
    expected = as_core_ml(parts, scheme)
    assert expected.dtype == (scheme.lut if isinstance(scheme, Palette) else scheme.scale)
    np.testing.assert_array_equal(decode(NAME, parts, stored), expected.astype(np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_must_fit_into_float16(symmetric: bool) -> None:
    """The scales alone would."""
    scheme = Affine(4, 32, symmetric, scale="float16")
    stored = stored_tensor((2, 64), scheme)
    rows = np.ones((2, 64), np.float32)
    rows[1, 3] = -70_000
    with pytest.raises(RequestError, match=r"up_proj\.weight: weights of 7e\+04 .* --compute fp32"):
        encoded(rows, stored)
    rows[1, 3] = -60_000
    assert np.isfinite(as_core_ml(encoded(rows, stored), scheme)).all()
    encoded(rows * 100, stored_tensor((2, 64), replace(scheme, scale="float32")))


_BlobStorageReader = pytest.importorskip("coremltools.libmilstoragepython")._BlobStorageReader

MLP, RECURRENT_PARAM = "mlp_block", "layers.0.temporal_block.rg_lru.recurrent_param"
PLAN: dict[str, Scheme] = {
    f"layers.0.{MLP}.gate_proj.weight": Affine(4, 32, True, scale="float16"),
    f"layers.0.{MLP}.up_proj.weight": Affine(4, 32, False, scale="float16"),
    f"layers.0.{MLP}.down_proj.weight": Affine(8, None, True, scale="float32"),
    f"layers.1.{MLP}.gate_proj.weight": Affine(8, 32, False, scale="float16"),
    f"layers.1.{MLP}.up_proj.weight": Palette(group=8),
    f"layers.1.{MLP}.down_proj.weight": Float("float16"),
    "final_norm.weight": Float("float32"),
    RECURRENT_PARAM: Float("float32"),
}
VECTORS = {"final_norm.weight", RECURRENT_PARAM}
_READERS = {"float16": "fp16", "float32": "float"}


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    shapes = {name: (24,) if name in VECTORS else (24, 64) for name in PLAN}
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def written(weights, folder):
    stored = CoreMLStorage(PLAN, {n: array.shape for n, array in weights.items()}, packages(8, ()))
    hashes = stored.write(folder, {name: from_array(array) for name, array in weights.items()})
    return stored, hashes, folder / weight_file()


def test_coremltools_reads_every_blob(weights, tmp_path):
    stored, hashes, path = written(weights, tmp_path)
    assert path.stat().st_size == sum(stored.sizes.values())
    assert struct.unpack("<II", path.read_bytes()[:8]) == (len(hashes), 2)
    reader = _BlobStorageReader(str(path))
    for name, tensor in stored.tensors.items():
        expected = encoded(weights[name], tensor, name)
        error = decode(name, expected, tensor) - weights[name]
        assert np.linalg.norm(error) < 0.15 * np.linalg.norm(weights[name])
        for label, part in tensor.parts.items():
            assert part.offset % ALIGNMENT == 0
            dtype = blob_dtype(label, tensor)
            method = getattr(reader, f"read_{_READERS.get(dtype, dtype)}_data")
            read = np.array(method(part.offset - ALIGNMENT))
            values = expected[label]
            if dtype.endswith("int4"):
                values = integers(values, 4, signed=dtype == "int4")
            read = read.view(values.dtype) if dtype == "float16" else read
            np.testing.assert_array_equal(read, values.reshape(-1), f"{name}.{label}")


def test_slabs_make_no_difference_and_hashes_are_those_of_the_blobs(weights, tmp_path, monkeypatch):
    stored, hashes, path = written(weights, tmp_path / "whole")
    data = path.read_bytes()
    assert hashes == {
        f"{name}.{label}": hashlib.sha256(data[part.offset : part.offset + part.nbytes]).hexdigest()
        for name, tensor in stored.tensors.items()
        for label, part in tensor.parts.items()
    }
    monkeypatch.setattr(storage, "SLAB_BYTES", 700)
    _, again, slabs = written(weights, tmp_path / "slabs")
    assert slabs.read_bytes() == data and again == hashes
