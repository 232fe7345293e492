import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.quantize import palette
from rgexport.quantize.clusters import centers
from rgexport.quantize.scheme import FloatDtype, Palette

DTYPES: tuple[FloatDtype, ...] = ("float16", "float32")


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, Palette]:
    """Rows that are whole groups, and their scheme."""
    group, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape = (group * groups, draw(st.integers(1, 60)))
    rows = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32)))
    return rows, Palette(group=group, lut=draw(st.sampled_from(DTYPES)))


def stored(rows: np.ndarray, scheme: Palette) -> np.ndarray:
    """Ŵ."""
    return palette.decode(palette.encode(rows, scheme), scheme, rows.shape[1])


@settings(deadline=None)
@given(matrices())
def test_parts_have_the_declared_layout(case: tuple[np.ndarray, Palette]) -> None:
    rows, scheme = case
    parts = palette.encode(rows, scheme)
    found = {name: (part.dtype.name, part.shape) for name, part in parts.items()}
    assert found == palette.part_layouts(*rows.shape, scheme)
    assert (np.diff(parts["lut"].astype(np.float64)) >= 0).all()


@settings(deadline=None)
@given(matrices())
def test_every_weight_is_the_nearest_value_of_its_group(case: tuple[np.ndarray, Palette]) -> None:
    rows, scheme = case
    parts = palette.encode(rows, scheme)
    decoded = palette.decode(parts, scheme, rows.shape[1])
    assert decoded.shape == rows.shape and decoded.dtype == np.float32
    tables = parts["lut"].astype(np.float64)[np.arange(len(rows)) // scheme.group]
    distances = np.abs(rows.astype(np.float64)[..., None] - tables[:, None])
    found = np.abs(decoded.astype(np.float64) - rows)
    np.testing.assert_allclose(found, distances.min(2), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(matrices(), st.data())
def test_groups_are_independent(case: tuple[np.ndarray, Palette], data: st.DataObject) -> None:
    rows, scheme = case
    cut = data.draw(st.integers(1, len(rows) // scheme.group)) * scheme.group
    whole = palette.encode(rows, scheme)
    pieces = [palette.encode(part, scheme) for part in (rows[:cut], rows[cut:]) if len(part)]
    for name, part in whole.items():
        np.testing.assert_array_equal(part, np.concatenate([piece[name] for piece in pieces]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_rounded_before_values_are_chosen(dtype: FloatDtype) -> None:
    rows = np.random.default_rng(0).normal(size=(32, 300)).astype(np.float32)
    parts = palette.encode(rows, Palette(group=16, lut=dtype))
    expected = np.stack([centers(group, 16) for group in rows.reshape(2, -1)])
    np.testing.assert_array_equal(parts["lut"], expected.astype(dtype))


def test_the_error_of_normal_weights() -> None:
    """16 levels at best leave 0.97 % of a normal distribution's variance (Max, 1960)."""
    rows = np.random.default_rng(1).normal(0, 0.02, (64, 1024)).astype(np.float32)
    error = np.linalg.norm(stored(rows, Palette()) - rows) / np.linalg.norm(rows)
    assert error == pytest.approx(0.009497**0.5, rel=0.01)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-8, 65504.0])
def test_equal_weights(value: float) -> None:
    rows = np.full((4, 33), value, np.float32)
    parts = palette.encode(rows, Palette(group=4))
    assert np.isfinite(parts["lut"]).all()
    decoded = palette.decode(parts, Palette(group=4), 33)
    assert (decoded == np.float32(np.float16(value))).all()


def test_what_float16_cannot_hold_is_refused() -> None:
    rows = np.full((2, 8), 70000, np.float32)
    with pytest.raises(RequestError, match=r"7\S*e\+04 are more than float16 holds"):
        palette.encode(rows, Palette(group=2))
    assert (stored(rows, Palette(group=2, lut="float32")) == 70000).all()
