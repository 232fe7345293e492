"""H as algorithms use it: shrunk, damped, and positive whatever the inputs were."""

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.quantize.statistics import statistics_of


def inputs(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, k)).astype(np.float32)


def test_shrinks_towards_the_diagonal_by_how_few_tokens_there_are():
    x = inputs(100, 100)
    h = x.T @ x / 100
    (part,) = statistics_of([h], 100).hessians
    off = ~np.eye(100, dtype=bool)
    np.testing.assert_allclose(part.matrix[off], 0.5 * h[off], rtol=1e-5)
    mean = np.diagonal(h).mean()
    np.testing.assert_allclose(np.diagonal(part.matrix), np.diagonal(h) + 0.01 * mean, rtol=1e-5)
    (many,) = statistics_of([h], 10**6).hessians
    np.testing.assert_allclose(many.matrix[off], 0.7 * h[off], rtol=1e-5)
    (few,) = statistics_of([h], 1).hessians
    np.testing.assert_allclose(few.matrix[off], 0.4 * h[off], rtol=1e-5)


def test_identity_is_in_units_of_the_mean_of_the_diagonal():
    h = np.diag(np.arange(1, 5, dtype=np.float32))
    found = statistics_of([h], 100, identity=2.0)
    np.testing.assert_allclose(found.importance, np.arange(1, 5) + 2.01 * 2.5, rtol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_and_dead_inputs_have_factors(tokens):
    x = inputs(tokens, 70)
    x[:, 3] = x[:, 40:] = 0
    h = x.T @ x / max(tokens, 1)
    found = statistics_of([h[:50, :50], h[50:, 50:]], tokens)
    assert [(part.start, part.stop) for part in found.hessians] == [(0, 50), (50, 70)]
    assert (found.importance > 0).all() and len(found.importance) == 70
    for part in found.hessians:
        k = len(part.matrix)
        m = np.eye(k) + part.factors.m
        np.testing.assert_allclose((m * part.factors.d) @ m.T, part.matrix, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    h = np.eye(8, dtype=np.float32)
    h[2, 5] = h[5, 2] = bad
    with pytest.raises(RequestError, match="NaN or infinite values; make them again"):
        statistics_of([np.eye(3, dtype=np.float32), h], 100)
