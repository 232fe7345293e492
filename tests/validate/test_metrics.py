import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rgexport.validate import metrics


def draw(n: int, vocab: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 3, (n, vocab)).astype(np.float32)
    return reference, reference + rng.normal(0, noise, (n, vocab)).astype(np.float32)


def next_of(n: int, vocab: int) -> np.ndarray:
    return np.append(np.arange(n - 1) % vocab, -1)


def naive(reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, ...]:
    """Log-probabilities and KL written down as in a textbook."""
    p, q = (np.exp(x.astype(np.float64)) for x in (reference, candidate))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    return np.log(p), np.log(q), (p * np.log(p / q)).sum(1)


def test_rows_equal_a_textbook_computation():
    reference, candidate = draw(40, 300)
    after = next_of(40, 300)
    rows = metrics.compare_logits(reference, candidate, after)
    log_p, log_q, kl = naive(reference, candidate)
    np.testing.assert_allclose(rows["kl"], kl, rtol=1e-12)
    delta = np.abs(reference.astype(np.float64) - candidate)
    np.testing.assert_allclose(rows["max_delta"], delta.max(1))
    np.testing.assert_allclose(rows["mean_delta"], delta.mean(1))
    np.testing.assert_allclose(rows["square_delta"], (delta**2).mean(1))
    each = np.arange(39)
    np.testing.assert_allclose(rows["nll"][:-1], -log_p[each, after[:-1]])
    np.testing.assert_allclose(rows["nll_candidate"][:-1], -log_q[each, after[:-1]])
    assert not rows["has_next"][-1] and rows["nll"][-1] == 0
    assert metrics.likelihood(rows[-1:], 4) is None
    a, b = (torch.from_numpy(x).double() for x in (reference, candidate))
    cosine = F.cosine_similarity(a, b).numpy()
    np.testing.assert_allclose(rows["cosine"], cosine, rtol=1e-12)
    error = metrics.logit_error(rows)
    assert (error.cosine, error.lowest_cosine) == pytest.approx((cosine.mean(), cosine.min()))
    kl_found = metrics.kl_summary(rows)
    assert kl_found.worst_position == kl.argmax()
    assert 0 <= metrics.kl_summary(metrics.compare_logits(reference, reference, after)).max < 1e-14


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    vocab=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    block=st.integers(1, 500),
)
def test_rows_do_not_depend_on_the_blocks(n, vocab, cuts, block):
    reference, candidate = draw(n, vocab)
    after = next_of(n, vocab)
    whole = metrics.compare_logits(reference, candidate, after)
    bounds = sorted({0, n, *(min(cut, n) for cut in cuts)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_VALUES", block)
        parts = [
            metrics.compare_logits(reference[a:b], candidate[a:b], after[a:b])
            for a, b in itertools.pairwise(bounds)
        ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_top_choices_and_flips():
    reference = np.array([[9, 8, 7, 6, 5, 0, 0], [1, 2, 0, 0, 0, 0, 0]], np.float32)
    candidate = np.array([[9, 8, 7, 6, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0]], np.float32)
    rows = metrics.compare_logits(reference, candidate, np.array([-1, -1]))
    assert rows["top1"].tolist() == [True, False]
    assert rows["top5"][0] == pytest.approx(0.8)
    assert rows["flip_margin"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, -2, 3], [-1, 2, -3], -1), ([0] * 3, [0] * 3, 1), ([1, 2, 3], [0] * 3, 0)],
)
def test_cosine_of_opposites_and_of_zeros(a, b, expected):
    for one, other in ((a, b), (b, a)):
        pair = (np.array([x], np.float32) for x in (one, other))
        rows = metrics.compare_logits(*pair, np.array([-1]))
        assert rows["cosine"][0] == pytest.approx(expected)


def test_near_ties_are_counted_apart():
    """Two of three positions flip, which the reference leads by 0.1 and by 2."""
    reference = np.array([[4, 3.9, -4, -4], [4, 2, -4, -4], [4, 2, -4, -4]], np.float32)
    candidate = np.array([[3, 3.9, -4, -4], [1, 2, -4, -4], [4, 2, -4, -4]], np.float32)
    rows = metrics.compare_logits(reference, candidate, np.array([-1, -1, -1]))
    spread = reference[0].std()
    counted = [metrics.agreement(rows, noise) for noise in (0, 0.1, 10)]
    assert [(found.flips, found.near_ties) for found in counted] == [(2, 0), (2, 1), (2, 2)]
    just_below, just_above = (0.1 / spread / 2**0.5 * x for x in (0.999, 1.001))
    assert metrics.agreement(rows, just_below).near_ties == 0
    assert metrics.agreement(rows, just_above).near_ties == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_spoil_the_summary(bad):
    reference, candidate = draw(6, 20)
    candidate[2, 3] = bad
    error = metrics.logit_error(metrics.compare_logits(reference, candidate, next_of(6, 20)))
    assert error.non_finite_positions == 1
    assert not np.isfinite(error.relative_max) and not np.isfinite(error.relative_rms)
