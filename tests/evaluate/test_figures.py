"""Intervals and differences against figures from elsewhere, and how often intervals are right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.evaluate.figures import mean, mean_difference, share, student


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (9, 10, 0.5958, 0.9821),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson(right, count, low, high):
    """The last one is the example of Newcombe, Statistics in Medicine 17, 1998."""
    found = share(right, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert found.value == right / count


def test_a_mean_of_equal_clusters_is_that_of_their_means():
    sums = np.random.default_rng(0).normal(10, 3, 50)
    found = mean(sums, [4] * 50)
    error = 2.009575 * (sums / 4).std(ddof=1) / 50**0.5  # Student's t with 49
    assert found.value == pytest.approx(sums.sum() / 200)
    assert found.high - found.value == pytest.approx(error, rel=1e-5)
    assert found.count == 200


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (99, 1.98422)]
)
def test_student(freedom, t):
    assert student(freedom) == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize("clusters", [2, 4, 40])
def test_intervals_hold_the_truth_as_often_as_they_say(clusters):
    """Clusters whose tokens have an error in common, as neighbours in a text do."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        counts = rng.integers(40, 64, clusters)
        errors = rng.normal(0, 0.5, clusters)
        sums = [
            c * (2 + e) + rng.normal(0, 1, c).sum() for c, e in zip(counts, errors, strict=True)
        ]
        found = mean(sums, counts)
        held += found.low <= 2 <= found.high
    assert 0.91 <= held / 400 <= 0.98


def test_differences_are_of_pairs():
    """What two models find hard alike is not in their difference."""
    rng = np.random.default_rng(2)
    first = rng.normal(100, 50, 200)
    found = mean_difference(first, first + rng.normal(0.6, 1, 200), [10] * 200)
    assert found.low < 0.06 < found.high and found.high - found.low < 0.04
    assert found.p == pytest.approx(1e-4)
    same = mean_difference(first, first, [10] * 200)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_one_cluster_tells_nothing_of_its_error():
    found = mean([12.0], [4])
    assert (found.value, found.low, found.high) == (3, None, None)
    assert mean_difference([1.0], [2.0], [4]).p is None


@pytest.mark.parametrize("differing", [1, 3, 12])
def test_p_is_that_of_the_sign_test_where_all_differences_are_alike(differing):
    """One side wins each of so many trials, and the others are ties."""
    second = [1.0] * differing + [0.0] * 20
    found = mean_difference([0.0] * len(second), second, [1] * len(second))
    assert found.p == pytest.approx(2 * 0.5**differing, abs=0.02)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_share_is_in_its_interval(drawn):
    found = share(*drawn)
    assert 0 <= found.low <= found.value <= found.high <= 1
