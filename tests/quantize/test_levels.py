"""Algorithms that choose levels: better than rounding to nearest, by what they minimize."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.quantize import affine, algorithms, palette
from rgexport.quantize.algorithms import search
from rgexport.quantize.scheme import Affine, Palette, Scheme
from rgexport.quantize.statistics import Statistics, statistics_of

SYMMETRIC = Affine(4, 32, symmetric=True, scale="float16")
ASYMMETRIC = Affine(4, 32, symmetric=False, scale="float16")
BYTES = Affine(8, 32, symmetric=True, scale="float16")
WHOLE = Affine(8, None, symmetric=True)
LAYOUTS = [SYMMETRIC, ASYMMETRIC, BYTES, WHOLE, Affine(4, 16, symmetric=True)]


def hessian(k: int, tokens: int = 300, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / k**0.5 + np.eye(k)
    x = rng.standard_normal((tokens, k)) @ mix * rng.lognormal(size=k)
    return (x.T @ x / tokens).astype(np.float32)


def statistics(k: int, seed: int = 0) -> Statistics:
    return statistics_of([hessian(k, seed=seed)], 300)


def weights(count: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, size=(count, k)).astype(np.float32)


def stored(rows: np.ndarray, scheme: Scheme, word: str, known: Statistics | None) -> np.ndarray:
    scheme = replace(scheme, algorithm=word)
    parts = algorithms.encode("w", rows, scheme, known)
    decode = affine.decode if isinstance(scheme, Affine) else palette.decode
    return decode(parts, scheme, rows.shape[1]).astype(np.float64)


def losses(rows: np.ndarray, found: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.einsum("nk,kl,nl->n", rows - found, h.astype(np.float64), rows - found)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(1, 9), st.integers(16, 150), st.integers(0, 99))
def test_never_worse_than_rounding_to_nearest(scheme, count, k, seed):
    rows, known = weights(count, k, seed), statistics(k, seed)
    nearest = stored(rows, scheme, "rtn", None)
    searched = stored(rows, scheme, "search", None)
    for part in range(0, k, scheme.block or k):
        own = np.s_[:, part : part + (scheme.block or k)]
        before, after = (np.square(rows - x)[own].sum(1) for x in (nearest, searched))
        assert (after <= before * (1 + 1e-5) + 1e-9).all()
    h = known.hessians[0].matrix
    weighed = affine.decode(
        affine.pack_parts(*search.choose(rows, scheme, known), scheme), scheme, k
    )
    diagonal = np.diag(np.diagonal(h))
    assert losses(rows, weighed, diagonal).sum() <= losses(rows, nearest, diagonal).sum() * 1.00001
    solved = stored(rows, scheme, "gptq", known)
    assert (losses(rows, solved, h) <= losses(rows, weighed, h) * 1.00001 + 1e-9).all()


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
def test_gains_at_four_bits(scheme):
    """About what the algorithms gain on a trained model: a tenth, and a third of the loss."""
    rows, known = weights(64, 256), statistics(256)
    error = {
        word: np.square(rows - stored(rows, scheme, word, None)).sum() for word in ("rtn", "search")
    }
    assert error["search"] < 0.93 * error["rtn"]
    h = known.hessians[0].matrix
    loss = {w: losses(rows, stored(rows, scheme, w, known), h).sum() for w in ("search", "gptq")}
    assert loss["gptq"] < 0.85 * loss["search"]


def test_palettes():
    rows, known, scheme = weights(32, 100), statistics(100), Palette(group=8)
    h = known.hessians[0].matrix
    plain, solved = (stored(rows, scheme, word, known) for word in ("kmeans", "gptq"))
    assert (losses(rows, solved, h) <= losses(rows, plain, h) * 1.00001).all()
    assert losses(rows, solved, h).sum() < 0.85 * losses(rows, plain, h).sum()


@pytest.mark.parametrize(
    ("scheme", "word"),
    [*itertools.product(LAYOUTS, ("search", "gptq")), (Palette(group=1), "gptq")],
)
def test_rows_are_independent(scheme, word):
    rows, known = weights(57, 96), statistics(96)
    whole = stored(rows, scheme, word, known)
    for start, stop in ((0, 1), (1, 50), (50, 57), (57, 57)):
        part = stored(rows[start:stop], scheme, word, known) if stop > start else whole[:0]
        np.testing.assert_array_equal(part, whole[start:stop])
    assert stored(rows[:0].reshape(0, 96), SYMMETRIC, "search", known).shape == (0, 96)


def test_hessians_in_parts_that_no_block_fits():
    """A scale for each row, and H in two parts: the scale stays, the levels still gain."""
    rows, h = weights(20, 90), hessian(90)
    known = statistics_of([h[:50, :50], h[50:, 50:]], 300)
    both = np.zeros((90, 90), np.float32)
    for part in known.hessians:
        both[part.start : part.stop, part.start : part.stop] = part.matrix
    for scheme in (WHOLE, SYMMETRIC):
        before, after = (
            losses(rows, stored(rows, scheme, w, known), both) for w in ("rtn", "gptq")
        )
        assert (after <= before * 1.00001).all() and after.sum() < 0.9 * before.sum()


HARD = {
    "zeros": np.zeros((3, 64)),
    "one constant": np.full((3, 64), 0.3),
    "constant channel": np.where(np.arange(64) == 5, 1e4, weights(3, 64)),
    "outliers": np.where(np.arange(64) % 7 == 0, 1e4, 1.0) * weights(3, 64),
    "tiny": weights(3, 64) * 1e-30,
    "denormal": weights(3, 64) * 1e-42,
    "a zero block": np.concatenate([np.zeros((3, 32)), weights(3, 32)], axis=1),
    "one sign": np.abs(weights(3, 64)) + 3,
}


@pytest.mark.parametrize("rows", HARD.values(), ids=HARD.keys())
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, Affine(4, 32, symmetric=True)])
@pytest.mark.parametrize("word", ["search", "gptq"])
def test_hard_weights(rows, scheme, word):
    rows = rows.astype(np.float32)
    h = hessian(64)
    h[3] = h[:, 3] = 0  # a dead input
    known = statistics_of([h], 1)
    found, nearest = (stored(rows, scheme, w, known) for w in (word, "rtn"))
    assert np.isfinite(found).all()
    least = known.hessians[0].matrix if word == "gptq" else np.eye(64)
    allowed = losses(rows, nearest, least)
    assert (losses(rows, found, least) <= allowed * 1.0001 + 1e-60).all()


def test_weights_beyond_float16_are_refused():
    for word in ("search", "gptq"):
        with pytest.raises(RequestError, match=r"w: its weights need a scale of .*float16"):
            stored(weights(2, 64) * 1e6, SYMMETRIC, word, statistics(64))
