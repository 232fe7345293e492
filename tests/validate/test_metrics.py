"""Comparisons of logits and of states, as numbers and position by position."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rgexport.chat.tokenizer import Tokenizer
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import POSITION, State
from rgexport.validate import metrics
from rgexport.validate.positions import (
    BLOCKS,
    CHOICES,
    CONTEXT,
    WORST,
    WorstPositions,
    position_blocks,
    token_text,
)
from rgexport.validate.reference_pass import run_reference, torch_reference
from rgexport.validate.states import state_errors, worst
from tests.models import ODD_CONFIGS, random_weights, weight_source

cuts_of_text = st.lists(st.integers(0, 60), max_size=5)


def draw(n: int, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a reference and of a candidate, and the tokens that follow, the last unknown."""
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 3, (n, vocab)).astype(np.float32)
    candidate = reference + rng.normal(0, 0.3, (n, vocab)).astype(np.float32)
    return reference, candidate, np.append(np.arange(n - 1) % vocab, -1)


def compared(reference: list[list[float]], candidate: list[list[float]]) -> np.ndarray:
    pair = (np.array(rows, np.float32) for rows in (reference, candidate))
    return metrics.compare_logits(*pair, np.full(len(reference), -1))


def test_rows_equal_a_textbook_computation():
    reference, candidate, after = draw(40, 300)
    rows = metrics.compare_logits(reference, candidate, after)
    p, q = (np.exp(x.astype(np.float64)) for x in (reference, candidate))
    p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
    kl = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(rows["kl"], kl, rtol=1e-12)
    delta = np.abs(reference.astype(np.float64) - candidate)
    np.testing.assert_allclose(rows["max_delta"], delta.max(1))
    np.testing.assert_allclose(rows["mean_delta"], delta.mean(1))
    np.testing.assert_allclose(rows["square_delta"], (delta**2).mean(1))
    each = np.arange(39)
    np.testing.assert_allclose(rows["nll"][:-1], -np.log(p[each, after[:-1]]))
    np.testing.assert_allclose(rows["nll_candidate"][:-1], -np.log(q[each, after[:-1]]))
    assert not rows["has_next"][-1] and rows["nll"][-1] == 0
    assert metrics.likelihood(rows[-1:], 4) is None
    a, b = (torch.from_numpy(x).double() for x in (reference, candidate))
    cosine = F.cosine_similarity(a, b).numpy()
    np.testing.assert_allclose(rows["cosine"], cosine, rtol=1e-12)
    error = metrics.logit_error(rows)
    assert (error.cosine, error.lowest_cosine) == pytest.approx((cosine.mean(), cosine.min()))
    assert metrics.kl_summary(rows).worst_position == kl.argmax()
    assert 0 <= metrics.kl_summary(metrics.compare_logits(reference, reference, after)).max < 1e-14


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), vocab=st.integers(1, 70), cuts=cuts_of_text, block=st.integers(1, 500))
def test_rows_do_not_depend_on_the_blocks(n, vocab, cuts, block):
    arrays = draw(n, vocab)
    bounds = sorted({0, n, *(min(cut, n) for cut in cuts)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_VALUES", block)
        parts = [
            metrics.compare_logits(*(array[a:b] for array in arrays))
            for a, b in itertools.pairwise(bounds)
        ]
    assert np.array_equal(np.concatenate(parts), metrics.compare_logits(*arrays))


def test_choices_flips_and_near_ties():
    rows = compared(
        [[9, 8, 7, 6, 5, 0, 0], [1, 2, 0, 0, 0, 0, 0]],
        [[9, 8, 7, 6, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0]],
    )
    assert rows["top1"].tolist() == [True, False] and rows["top5"][0] == pytest.approx(0.8)
    assert rows["flip_margin"].tolist() == [0, 1]
    # Two of three positions flip, which the reference leads by 0.1 and by 2.
    reference = [[4, 3.9, -4, -4], [4, 2, -4, -4], [4, 2, -4, -4]]
    rows = compared(reference, [[3, 3.9, -4, -4], [1, 2, -4, -4], [4, 2, -4, -4]])
    limit = 0.1 / np.std(reference[0]) / 2**0.5
    for noise, near_ties in ((0, 0), (0.999 * limit, 0), (1.001 * limit, 1), (0.1, 1), (10, 2)):
        agreement = metrics.agreement(rows, noise)
        assert (agreement.flips, agreement.near_ties) == (2, near_ties)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_counted_and_spoil_the_summary(bad):
    reference, candidate, after = draw(6, 20)
    candidate[2, 3] = bad
    error = metrics.logit_error(metrics.compare_logits(reference, candidate, after))
    assert error.non_finite_positions == 1
    assert not np.isfinite(error.relative_max) and not np.isfinite(error.relative_rms)


@given(length=st.integers(1, 700), seed=st.integers(0, 5))
def test_blocks_of_positions_cover_the_text_once(length, seed):
    rows = np.zeros(length, metrics.ROWS)
    rows["kl"] = kl = np.random.default_rng(seed).random(length)
    rows["top1"] = kl < 0.5
    blocks = position_blocks(rows)
    assert len(blocks) == min(BLOCKS, length)
    assert [b.stop for b in blocks[:-1]] == [b.start for b in blocks[1:]]
    assert (blocks[0].start, blocks[-1].stop) == (0, length)
    sizes = np.array([b.stop - b.start for b in blocks])
    assert max(sizes) - min(sizes) <= 1
    assert [b.kl_mean for b in blocks] @ sizes == pytest.approx(kl.sum())
    assert [b.top1 for b in blocks] @ sizes == pytest.approx((kl < 0.5).sum())
    assert max(b.kl_max for b in blocks) == kl.max()


@settings(deadline=None)
@given(length=st.integers(1, 60), cuts=cuts_of_text)
def test_the_worst_positions_do_not_depend_on_the_blocks(length, cuts):
    rng = np.random.default_rng(length)
    kl, tokens = rng.permutation(length) / 7, rng.integers(0, 9, length)
    a, b = rng.normal(size=(2, length, 9))
    seen = WorstPositions(tokens)
    for start, stop in itertools.pairwise(sorted({0, length, *(min(cut, length) for cut in cuts)})):
        seen.see(start, kl[start:stop], a[start:stop], b[start:stop])
    assert [place.position for place in seen.found] == np.argsort(-kl)[:WORST].tolist()
    for place in seen.found:
        assert place.kl == kl[place.position]
        for choices, logits in ((place.reference, a), (place.candidate, b)):
            share = np.exp(logits[place.position])
            share /= share.sum()
            likeliest = np.argsort(-share)[:CHOICES]
            assert [choice.token for choice in choices] == likeliest.tolist()
            assert [choice.probability for choice in choices] == pytest.approx(share[likeliest])


def test_nothing_of_the_vocabularys_size_is_kept():
    seen = WorstPositions(np.zeros(400, np.int64))
    logits = np.zeros((10, 20_000), np.float32)
    tracemalloc.start()
    for start in range(0, 400, 10):
        seen.see(start, np.arange(start, start + 10, dtype=np.float64), logits, logits + 1)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [place.position for place in seen.found] == list(range(399, 389, -1))
    assert kept < logits.nbytes / 4


def test_nan_is_the_worst_position():
    kl = np.array([3, math.nan, 9, math.inf, *range(20)], np.float64)
    seen = WorstPositions(np.arange(24))
    seen.see(0, kl, np.zeros((24, 5)), np.full((24, 5), math.nan))
    assert [place.position for place in seen.found[:3]] == [1, 3, 23]
    assert math.isnan(seen.found[0].candidate[0].probability)


def test_the_text_around_a_position():
    """Special tokens and parts of characters are shown, too."""
    seen = WorstPositions(np.arange(40), lambda ids: " ".join(map(str, ids)))
    seen.see(38, np.array([1.0, 0.5]), np.zeros((2, 3)), np.zeros((2, 3)))
    inside, last = seen.found
    assert inside.context == " ".join(map(str, range(39 - CONTEXT, 39)))
    assert (inside.next_token, inside.next_text) == (39, "39")
    assert (last.next_token, last.next_text) == (None, None)
    pieces = [b"", b"a ", "é".encode()[:1], "é".encode()[1:]]
    spell = token_text(Tokenizer(4, {"<bos>": 0}, 0, None, lambda text: [], pieces.__getitem__))
    assert (spell([0, 1, 2, 3]), spell([2])) == ("<bos>a é", "\\xc3")


def state_of(**arrays: list[float]) -> State:
    state = {f"layers.0.{name}": np.array([a], np.float32) for name, a in arrays.items()}
    return state | {POSITION: np.array([3])}


def test_errors_of_states_are_relative_to_the_reference():
    key, value = state_errors(
        state_of(key=[3, -4], value=[1, 1]), state_of(key=[3, -2], value=[1, 1])
    )
    assert (key.name, key.relative_max, key.relative_norm) == ("layers.0.key", 0.5, 0.4)
    assert (value.relative_max, value.relative_norm) == (0, 0)
    assert worst([key, value]) == 0.5 and worst([]) == 0
    (zeros,) = state_errors(state_of(key=[0, 0]), state_of(key=[0, 0.25]))
    assert zeros.relative_max == zeros.relative_norm == 0.25
    assert np.isnan(worst(state_errors(state_of(key=[1]), state_of(key=[np.nan]))))
    shorter = state_errors(state_of(key=[1, 2, 3], rg_lru=[1]), state_of(key=[1, 2], rg_lru=[1]))
    assert [error.name for error in shorter] == ["layers.0.rg_lru"], "another window is left out"


def test_logits_of_blocks_are_those_of_one_pass():
    config = ODD_CONFIGS["irregular"]
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, 60)
    weights = weight_source(random_weights(config))
    taught = run_reference("Running", torch_reference("cpu"), config, weights, tokens)
    reference = Reference(config, weights)
    hidden, state = reference.run(tokens[None])
    whole = reference.logits(hidden)[0]
    assert np.array_equal(taught.logits(0, 60), whole)
    np.testing.assert_allclose(taught.logits(7, 31), whole[7:31], atol=1e-5)
    assert all(np.array_equal(taught.state[name], array) for name, array in state.items())
