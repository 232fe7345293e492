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


def test_rows_equal_a_textbook_computation() -> None:
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


def test_equal_logits_differ_in_nothing() -> None:
    reference, _ = draw(8, 50)
    rows = metrics.compare_logits(reference, reference, next_of(8, 50))
    assert metrics.logit_error(rows).max == 0
    assert 0 <= metrics.kl_summary(rows).max < 1e-14
    assert metrics.agreement(rows) == metrics.Agreement(
        top1=1, top5=1, largest_flip_margin=0, flips=0, near_ties=0
    )
    assert rows["cosine"] == pytest.approx(1, abs=1e-12)


def test_a_shift_of_all_logits_is_an_error_but_no_divergence() -> None:
    reference, _ = draw(8, 50)
    rows = metrics.compare_logits(reference, reference + 2, next_of(8, 50))
    assert metrics.logit_error(rows).mean == pytest.approx(2, rel=1e-6)
    assert metrics.kl_summary(rows).max < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    vocab=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    block=st.integers(1, 500),
)
def test_rows_do_not_depend_on_the_blocks(n: int, vocab: int, cuts: list[int], block: int) -> None:
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


def test_top_choices_and_flips() -> None:
    reference = np.array([[9, 8, 7, 6, 5, 0, 0], [1, 2, 0, 0, 0, 0, 0]], np.float32)
    candidate = np.array([[9, 8, 7, 6, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0]], np.float32)
    rows = metrics.compare_logits(reference, candidate, np.array([-1, -1]))
    assert rows["top1"].tolist() == [True, False]
    assert rows["top5"][0] == pytest.approx(0.8)
    assert rows["flip_margin"].tolist() == [0, 1]


def test_cosine_equals_torch() -> None:
    reference, candidate = draw(20, 500, noise=2.0)
    rows = metrics.compare_logits(reference, candidate, next_of(20, 500))
    a, b = (torch.from_numpy(x).double() for x in (reference, candidate))
    expected = F.cosine_similarity(a, b).numpy()
    np.testing.assert_allclose(rows["cosine"], expected, rtol=1e-12)
    found = metrics.logit_error(rows)
    assert found.cosine == pytest.approx(expected.mean())
    assert found.lowest_cosine == pytest.approx(expected.min())


def test_cosine_of_opposites_and_of_nothing() -> None:
    some, nothing = np.array([[1, -2, 3]], np.float32), np.zeros((1, 3), np.float32)
    pairs = ((some, -some, -1), (nothing, nothing, 1), (some, nothing, 0), (nothing, some, 0))
    for a, b, expected in pairs:
        rows = metrics.compare_logits(a, b, np.array([-1]))
        assert rows["cosine"][0] == pytest.approx(expected)


def test_near_ties_are_counted_apart() -> None:
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
def test_values_that_are_not_finite_are_counted_and_spoil_the_summary(bad: float) -> None:
    reference, candidate = draw(6, 20)
    candidate[2, 3] = bad
    error = metrics.logit_error(metrics.compare_logits(reference, candidate, next_of(6, 20)))
    assert error.non_finite_positions == 1
    assert not np.isfinite(error.relative_max) and not np.isfinite(error.relative_rms)


def test_relative_rms_of_constant_logits_is_one() -> None:
    reference, _ = draw(30, 400)
    reference -= reference.mean(1, keepdims=True)
    rows = metrics.compare_logits(reference, np.zeros_like(reference), next_of(30, 400))
    assert metrics.logit_error(rows).relative_rms == pytest.approx(1, rel=1e-6)


def test_likelihood_in_bits_per_byte() -> None:
    uniform = np.zeros((9, 256), np.float32)
    rows = metrics.compare_logits(uniform, uniform, next_of(9, 256))
    found = metrics.likelihood(rows, text_bytes=8)
    assert found is not None and found.tokens == 8
    assert found.bits_per_byte == pytest.approx(8)
    assert found.perplexity == pytest.approx(256)
    assert found.delta == 0 == found.delta_standard_error


def test_no_likelihood_without_a_next_token() -> None:
    logits = np.zeros((1, 4), np.float32)
    assert metrics.likelihood(metrics.compare_logits(logits, logits, np.array([-1])), 4) is None


def test_summary_of_kl() -> None:
    rows = np.zeros(101, metrics.ROWS)
    rows["kl"] = np.arange(101)
    found = metrics.kl_summary(rows)
    assert (found.mean, found.median, found.p95, found.p99, found.max) == (50, 50, 95, 99, 100)
    assert found.worst_position == 100
    assert found.standard_error == pytest.approx(np.std(np.arange(101), ddof=1) / np.sqrt(101))
