import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.quantize.clusters import centers

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


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    count=st.integers(1, 3000),
    outliers=st.lists(st.floats(-1e4, 1e4, width=32), max_size=4),
    seed=st.integers(0, 1000),
)
def test_no_worse_than_even_levels(kind: str, count: int, outliers: list[float], seed: int) -> None:
    x = np.append(sample(kind, count, seed), np.float32(outliers)).astype(np.float32)
    even = np.linspace(float(x.min()), float(x.max()), 16)
    noise = 1e-12 * float(np.square(x.astype(np.float64)).sum())
    assert squared_error(x, centers(x, 16)) <= squared_error(x, even) * (1 + 1e-9) + noise


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
