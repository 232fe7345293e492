"""What is stored against what Core ML makes of it: the formulas of coremltools' own operations."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.export.coreml.parts import decode, encode, part_layouts
from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.quantize.affine import Parts
from rgexport.quantize.fitting import fitted
from rgexport.quantize.scheme import Affine, Float, Ggml, Palette, Scheme
from rgexport.quantize.statistics import no_statistics

pytest.importorskip("coremltools")

NAME = "layers.0.mlp_block.up_proj.weight"
DTYPES = ("float16", "float32")
affines = st.builds(
    Affine,
    st.sampled_from([4, 8]),
    st.sampled_from([None, 8, 32]),
    symmetric=st.booleans(),
    scale=st.sampled_from(DTYPES),
)
palettes = st.builds(Palette, group=st.sampled_from([1, 2, 16]), lut=st.sampled_from(DTYPES))
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-100, 100, width=32),
)


def stored_tensor(shape: tuple[int, ...], scheme: Scheme) -> StoredTensor:
    layouts = part_layouts(shape, scheme)
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


def encoded(rows: np.ndarray, stored: StoredTensor) -> Parts:
    return encode(no_statistics, NAME, rows, np.arange(len(rows)), stored)


@settings(deadline=None, max_examples=150)
@given(matrices, st.one_of(affines, palettes))
def test_decoding_is_core_mls(rows: np.ndarray, asked: Affine | Palette) -> None:
    scheme = fitted(asked, rows.shape)
    assert isinstance(scheme, Affine | Palette)
    stored = stored_tensor(rows.shape, scheme)
    parts = encoded(rows, stored)
    layouts = {label: (part.dtype.name, part.shape) for label, part in parts.items()}
    assert layouts == part_layouts(rows.shape, scheme)
    expected = as_core_ml(parts, scheme)
    assert expected.dtype == (scheme.lut if isinstance(scheme, Palette) else scheme.scale)
    np.testing.assert_array_equal(decode(NAME, parts, stored), expected.astype(np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_must_fit_into_float16(bits: Literal[4, 8], symmetric: bool) -> None:
    """The scales alone would."""
    scheme = Affine(bits, 32, symmetric, scale="float16")
    stored = stored_tensor((2, 64), scheme)
    rows = np.ones((2, 64), np.float32)
    rows[1, 3] = -70_000
    with pytest.raises(RequestError, match=r"up_proj\.weight: weights of 7e\+04 .* --compute fp32"):
        encoded(rows, stored)
    rows[1, 3] = -60_000
    assert np.isfinite(as_core_ml(encoded(rows, stored), scheme)).all()
    encoded(rows * 100, stored_tensor((2, 64), replace(scheme, scale="float32")))


@pytest.mark.parametrize(
    ("shape", "scheme", "expected"),
    [
        ((6, 64), Affine(8, None, symmetric=True), {"data": ("int8", (6, 64)), "scales": 1}),
        ((6, 64), Affine(4, 32, symmetric=True), {"data": ("uint8", (6, 32)), "scales": 2}),
        (
            (6, 64),
            Affine(4, 32, symmetric=False),
            {"data": ("uint8", (6, 32)), "scales": 2, "zero_points": ("uint8", (6, 1))},
        ),
        (
            (6, 64),
            Affine(8, None, symmetric=False, scale="float16"),
            {"data": ("uint8", (6, 64)), "scales": 1, "zero_points": ("uint8", (6, 1))},
        ),
        ((6, 64), Palette(group=3), {"data": ("uint8", (6, 32)), "lut": ("float16", (2, 16))}),
        ((5, 1, 4), Float("float16"), {"data": ("float16", (5, 1, 4))}),
    ],
)
def test_layouts(shape: tuple[int, ...], scheme: Scheme, expected: dict[str, object]) -> None:
    if isinstance(scheme, Affine):
        expected = expected | {"scales": (scheme.scale, (shape[0], expected["scales"]))}
    assert part_layouts(shape, scheme) == expected


@pytest.mark.parametrize(
    ("shape", "scheme"),
    [
        ((6, 64), Affine(4, 128, symmetric=True)),
        ((6, 64), Affine(4, 24, symmetric=True)),
        ((6, 63), Affine(4, None, symmetric=True)),
        ((6, 64), Affine(4, None, symmetric=False)),
        ((6, 64), Palette(group=4)),
        ((6, 63), Palette(group=3)),
        ((6, 4, 4), Affine(8, None, symmetric=True)),
        ((6, 64), Affine(3, 32, symmetric=True)),
        ((6, 64), Ggml("q4_0")),
    ],
)
def test_what_core_ml_does_not_have(shape: tuple[int, ...], scheme: Scheme) -> None:
    with pytest.raises(RequestError, match="that Core ML does not have"):
        part_layouts(shape, scheme)
