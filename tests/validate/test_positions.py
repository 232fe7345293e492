import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.tokenizer import Tokenizer
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


def rows_of(kl: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(kl), metrics.ROWS)
    rows["kl"] = kl
    rows["top1"] = kl < 0.5
    return rows


@given(length=st.integers(1, 700), seed=st.integers(0, 5))
def test_blocks_cover_the_text_once(length, seed):
    kl = np.random.default_rng(seed).random(length)
    blocks = position_blocks(rows_of(kl))
    assert len(blocks) == min(BLOCKS, length)
    assert [b.stop for b in blocks[:-1]] == [b.start for b in blocks[1:]]
    assert (blocks[0].start, blocks[-1].stop) == (0, length)
    sizes = [b.stop - b.start for b in blocks]
    assert max(sizes) - min(sizes) <= 1
    mean = sum(b.kl_mean * size for b, size in zip(blocks, sizes, strict=True)) / length
    assert mean == pytest.approx(kl.mean())
    assert max(b.kl_max for b in blocks) == kl.max()
    agreed = sum(b.top1 * size for b, size in zip(blocks, sizes, strict=True))
    assert agreed == pytest.approx((kl < 0.5).sum())


@settings(deadline=None)
@given(length=st.integers(1, 60), cuts=st.lists(st.integers(1, 59), max_size=5))
def test_worst_positions_do_not_depend_on_the_blocks(length, cuts):
    rng = np.random.default_rng(length)
    kl, tokens = rng.permutation(length) / 7, rng.integers(0, 9, length)
    a, b = rng.normal(size=(2, length, 9))
    worst = WorstPositions(tokens)
    bounds = sorted({0, length, *(min(cut, length) for cut in cuts)})
    for start, stop in itertools.pairwise(bounds):
        worst.see(start, kl[start:stop], a[start:stop], b[start:stop])
    found = worst.found
    assert [place.position for place in found] == np.argsort(-kl)[:WORST].tolist()
    for place in found:
        assert place.kl == kl[place.position]
        for choices, logits in ((place.reference, a), (place.candidate, b)):
            share = np.exp(logits[place.position])
            share /= share.sum()
            likeliest = np.argsort(-share)[:CHOICES]
            assert [choice.token for choice in choices] == likeliest.tolist()
            assert [choice.probability for choice in choices] == pytest.approx(share[likeliest])


def test_nothing_of_the_vocabularys_size_is_kept():
    worst = WorstPositions(np.zeros(400, np.int64))
    logits = np.zeros((10, 20_000), np.float32)
    tracemalloc.start()
    for start in range(0, 400, 10):
        worst.see(start, np.arange(start, start + 10, dtype=np.float64), logits, logits + 1)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [place.position for place in worst.found] == list(range(399, 389, -1))
    assert kept < logits.nbytes / 4


def test_nan_is_the_worst_position():
    kl = np.array([3, math.nan, 9, math.inf, *range(20)], np.float64)
    worst = WorstPositions(np.arange(24))
    worst.see(0, kl, np.zeros((24, 5)), np.full((24, 5), math.nan))
    assert [place.position for place in worst.found[:3]] == [1, 3, 23]
    assert math.isnan(worst.found[0].candidate[0].probability)


def test_the_text_around_a_position():
    tokens = np.arange(40)
    worst = WorstPositions(tokens, lambda ids: " ".join(map(str, ids)))
    worst.see(38, np.array([1.0, 0.5]), np.zeros((2, 3)), np.zeros((2, 3)))
    inside, last = worst.found
    assert inside.context == " ".join(map(str, range(39 - CONTEXT, 39)))
    assert (inside.next_token, inside.next_text) == (39, "39")
    assert (last.next_token, last.next_text) == (None, None)
    assert inside.reference[0].text == "0"


def test_a_speller_shows_special_tokens_and_parts_of_characters():
    pieces = [b"", b"a ", "é".encode()[:1], "é".encode()[1:]]
    tokenizer = Tokenizer(4, {"<bos>": 0}, 0, None, lambda text: [], pieces.__getitem__)
    spell = token_text(tokenizer)
    assert spell([0, 1, 2, 3]) == "<bos>a é"
    assert spell([2]) == "\\xc3"
