import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.validate.reference.condensed import (
    CODES,
    LEAST,
    MOST,
    RELATIVE_WIDTH,
    condense,
    kl_bounds,
    lead,
)


def exact_kl(reference: np.ndarray, candidate: np.ndarray) -> float:
    """In longdouble, and not by the code that is tested."""
    log_p, log_q = (x.astype(np.longdouble) for x in (reference, candidate))
    log_p, log_q = (x - np.logaddexp.reduce(x) for x in (log_p, log_q))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def draw(seed: int, vocab: int, spread: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = (spread * rng.standard_normal(vocab)).astype(np.float32)
    reference[rng.integers(vocab)] += 3 * spread
    return reference, reference + delta * rng.standard_normal(vocab).astype(np.float32)


random_pairs = st.builds(
    draw,
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([17, 100, 1000, 3000]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 9.0]),
    delta=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 5.0]),
)


@settings(max_examples=150, deadline=None)
@given(random_pairs, st.sampled_from(sorted(CODES)), st.sampled_from([LEAST, 64, MOST]))
def test_kl_lies_in_its_interval(pair, bits, most):
    reference, candidate = pair
    found = kl_bounds(condense(reference, bits, most), candidate)
    truth = exact_kl(reference, candidate)
    assert found.low <= found.best <= found.high
    assert found.low - 1e-12 <= truth <= found.high + 1e-12


@settings(max_examples=60, deadline=None)
@given(random_pairs, st.permutations(range(12)))
def test_the_bounds_hold_for_another_order_of_the_tail(pair, order):
    """Without codes the tail's order is unknown, so the interval holds for any order."""
    reference, candidate = pair
    condensed = condense(reference, 0, LEAST)
    rest = np.delete(np.arange(len(reference)), condensed.ids)
    some = np.array([i for i in order if i < len(rest)], int)
    shuffled = reference.copy()
    shuffled[rest[: len(some)]] = reference[rest[some]]
    found = kl_bounds(condensed, candidate)
    assert found.low - 1e-12 <= exact_kl(shuffled, candidate) <= found.high + 1e-12


def test_the_bounds_are_reached():
    """No interval that is narrower would be right: a tail in the worst order is at its end."""
    reference = np.log(np.r_[np.full(LEAST, 0.05), np.full(8, 0.2 / 8), np.full(8, 1e-12)])
    condensed = condense(reference.astype(np.float32), 0, LEAST)
    candidate = np.zeros(len(reference), np.float32)
    candidate[LEAST + 8 :] = -4
    found = kl_bounds(condensed, candidate)
    turned = np.r_[reference[:LEAST], reference[LEAST:][::-1]]
    assert found.low == pytest.approx(exact_kl(reference, candidate), abs=1e-4)
    assert found.high == pytest.approx(exact_kl(turned, candidate), abs=1e-4)


@pytest.mark.parametrize(
    ("bits", "spread", "delta", "rel"),
    [(16, 1.0, 0.1, 1e-4), (16, 5.0, 2.0, 1e-4), (16, 2.5, 1e-3, 1e-3), (8, 2.5, 1e-3, 3e-2)],
)
def test_the_best_guess_is_good(bits, spread, delta, rel):
    reference, candidate = draw(2, 8192, spread, delta)
    found, truth = kl_bounds(condense(reference, bits), candidate), exact_kl(reference, candidate)
    assert found.best == pytest.approx(truth, rel=rel)
    if rel == 1e-4:
        assert found.high - found.low <= 1.5 * RELATIVE_WIDTH * truth


def test_a_peaked_distribution_keeps_few_tokens_and_a_flat_one_many():
    peaked, flat = (draw(3, 8192, spread, 0)[0] for spread in (9.0, 0.5))
    few, many = (condense(logits, 0, 2048) for logits in (peaked, flat))
    assert LEAST <= len(few.ids) < len(many.ids) == 2048
    assert few.tail.mass < 1e-3 < many.tail.mass
    order = np.argsort(-peaked)
    assert np.array_equal(few.ids, order[: len(few.ids)])
    assert np.array_equal(few.logits, peaked[few.ids])


@pytest.mark.parametrize("bits", sorted(CODES))
def test_logits_that_are_not_finite_give_nan(bits):
    reference, candidate = draw(6, 100, 2.0, 0.1)
    candidate[50] = np.nan
    assert all(np.isnan(value) for value in kl_bounds(condense(reference, bits), candidate))


@settings(max_examples=60, deadline=None)
@given(random_pairs, st.sampled_from(sorted(CODES)), st.integers(0, 16))
def test_a_lead_is_at_least_its_lower_bound(pair, bits, token):
    reference, _ = pair
    kept = condense(reference, bits, LEAST)
    truth = float(reference.max()) - float(reference[token])
    bound = lead(kept, token)
    assert 0 <= bound <= truth + 1e-5 * (1 + np.abs(reference).max())
    if token in kept.ids or (bits == 16 and kept.tail.codes[token]):
        assert bound == pytest.approx(truth, abs=1e-2)
