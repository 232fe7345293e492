"""Palettes, and the clusters that their tables are made of."""

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


@settings(deadline=None)
@given(matrices())
def test_every_weight_is_the_nearest_value_of_its_group(case: tuple[np.ndarray, Palette]) -> None:
    rows, scheme = case
    parts = palette.encode(rows, scheme)
    layouts = {name: (part.dtype.name, part.shape) for name, part in parts.items()}
    assert layouts == palette.part_layouts(*rows.shape, scheme)
    assert (np.diff(parts["lut"].astype(np.float64)) >= 0).all()
    decoded = palette.decode(parts, scheme, rows.shape[1])
    assert decoded.shape == rows.shape and decoded.dtype == np.float32
    tables = parts["lut"].astype(np.float64)[np.arange(len(rows)) // scheme.group]
    distances = np.abs(rows.astype(np.float64)[..., None] - tables[:, None])
    found = np.abs(decoded.astype(np.float64) - rows)
    np.testing.assert_allclose(found, distances.min(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_rounded_before_values_are_chosen(dtype: FloatDtype) -> None:
    rows = np.random.default_rng(0).normal(size=(32, 300)).astype(np.float32)
    parts = palette.encode(rows, Palette(group=16, lut=dtype))
    expected = np.stack([centers(group, 16) for group in rows.reshape(2, -1)])
    np.testing.assert_array_equal(parts["lut"], expected.astype(dtype))


def test_what_float16_cannot_hold_is_refused() -> None:
    rows = np.full((2, 8), 70000, np.float32)
    with pytest.raises(RequestError, match=r"7\S*e\+04 are more than float16 holds"):
        palette.encode(rows, Palette(group=2))
    wide = Palette(group=2, lut="float32")
    assert (palette.decode(palette.encode(rows, wide), wide, 8) == 70000).all()


KINDS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "heavy": lambda rng, n: rng.standard_t(2, n),
    "very heavy": lambda rng, n: rng.standard_cauchy(n),
    "one-sided": lambda rng, n: rng.exponential(size=n),
    "two humps": lambda rng, n: rng.normal(size=n) * 0.1 + rng.choice([-3, 3], n),
    "spikes": lambda rng, n: rng.integers(0, 12, n) + rng.normal(size=n) * 1e-3,
    "steps": lambda rng, n: rng.integers(-40, 40, n) / 8,
    "outlier": lambda rng, n: np.append(rng.normal(size=n - 1), 300),
    "far away": lambda rng, n: rng.normal(size=n) + 1000,
}
values = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
)


def squared_error(x: np.ndarray, levels: np.ndarray) -> float:
    """Of every value against the level that is nearest to it."""
    nearest = np.abs(x.astype(np.float64)[:, None] - levels).min(1)
    return float(np.square(nearest).sum())


def least_squared_error(x: np.ndarray, count: int) -> float:
    """The optimum, over all ways to cut the sorted values; each interval measured by itself."""
    x = np.sort(x.astype(np.float64))
    n = len(x)
    interval = np.full((n + 1, n + 1), np.inf)
    interval[np.arange(n + 1), np.arange(n + 1)] = 0
    for start in range(n):
        ends = np.arange(start + 1, n + 1)
        part = x[start:] - x[start]
        squares, sums = np.cumsum(part**2), np.cumsum(part)
        interval[start, ends] = np.maximum(squares - sums**2 / (ends - start), 0)
    best = interval[0]
    for _ in range(count - 1):
        best = (best[:, None] + interval).min(0)
    return float(best[-1])


def sample(kind: str, count: int, seed: int) -> np.ndarray:
    return KINDS[kind](np.random.default_rng(seed), count).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(values, st.integers(1, 17))
def test_few_values_are_clustered_optimally(x: np.ndarray, count: int) -> None:
    found = centers(x, count)
    assert found.shape == (count,) and (np.diff(found) >= 0).all()
    noise = 1e-12 * float(np.square(x.astype(np.float64)).sum())
    optimum = least_squared_error(x, count)
    assert squared_error(x, found) <= optimum * (1 + 1e-9) + noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [300, 700])
def test_many_values_are_clustered_almost_optimally(kind: str, count: int) -> None:
    for seed in range(3):
        x = sample(kind, count, seed)
        found, optimum = squared_error(x, centers(x, 16)), least_squared_error(x, 16)
        assert optimum * (1 - 1e-6) <= found <= optimum * 1.02 + 1e-9, seed


def test_a_normal_distribution_gets_the_levels_of_max() -> None:
    """J. Max, Quantizing for minimum distortion (1960), table I: 16 levels.

    The least error is flat: levels that are off by a twentieth still have it to a percent.
    """
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    found = centers(x, 16)
    positive = np.array([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
    published = np.concatenate([-positive[::-1], positive])
    np.testing.assert_allclose(found, published, rtol=0, atol=0.06)
    error, theirs = squared_error(x, found), squared_error(x, published)
    assert 0.995 * theirs < error < theirs, "a sample has a better optimum than its distribution"
