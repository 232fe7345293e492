"""Affine blocks and palettes, and the algorithms that choose their levels."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.quantize.algorithms.kmeans import centers
from rgexport.quantize.algorithms.statistics import RowKinds, statistics_of
from rgexport.quantize.plan import with_algorithm
from rgexport.quantize.schemes.registry import Affine, Float, Palette, scheme_from_dict

HALVES = [
    Affine(bits, block, symmetric, scale="float16")
    for bits, block, symmetric in product((4, 8), (None, 13, 32), (True, False))
]
SCHEMES = [*HALVES, *(replace(one, scale="float32") for one in HALVES)]
MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=150),
    elements=st.floats(-1000, 1000, width=32),
)


@given(MATRICES, st.sampled_from(SCHEMES))
def test_scales_reach_every_weight(weights, scheme):
    """They are rounded away from zero: only a level that is missing on one side may clip."""
    parts = scheme.encode("w", weights)
    scales = np.abs(parts["scales"].astype(np.float64))
    block = scheme.block_size(weights.shape[1])
    spread = scales.repeat(block, axis=1)[:, : weights.shape[1]]
    starts = np.arange(0, weights.shape[1], block)
    wide = weights.astype(np.float64)
    if scheme.symmetric:
        reach = np.maximum.reduceat(np.abs(wide), starts, axis=1) / 2 ** (scheme.bits - 1)
    else:
        high = np.maximum(np.maximum.reduceat(wide, starts, axis=1), 0)
        low = np.minimum(np.minimum.reduceat(wide, starts, axis=1), 0)
        reach = (high - low) / (2**scheme.bits - 1)
    used = scales != 1
    most = np.maximum(reach * (1 + 2**-10 + 1e-6), 2**-24 * 1.000001 + reach)
    assert (scales >= reach * (1 - 1e-6))[used].all() and (scales <= most)[used].all()
    error = np.abs(scheme.decode(parts, weights.shape[1]) - wide)
    missing = np.maximum(np.abs(wide) - (2 ** (scheme.bits - 1) - 1.5) * spread, 0)
    assert (error <= spread * 0.5001 + (missing if scheme.symmetric else 0)).all()


def stream(packed, bits):
    """The integers in rows of bytes."""
    single = np.unpackbits(packed, axis=1, bitorder="little")
    whole = single[:, : single.shape[1] // bits * bits].reshape(len(packed), -1, bits)
    return whole @ 2.0 ** np.arange(bits)


@given(MATRICES, st.sampled_from(SCHEMES))
def test_weights_are_products_of_integers_and_scales(weights, scheme):
    parts, columns = scheme.encode("w", weights), weights.shape[1]
    layout = {name: (part.dtype.name, part.shape) for name, part in parts.items()}
    assert layout == scheme.part_shapes(weights.shape)
    blocks = np.arange(columns) // scheme.block_size(columns)
    zeros = np.full(parts["scales"].shape, 2 ** (scheme.bits - 1))
    if not scheme.symmetric:
        zeros = stream(parts["zero_points"], scheme.bits)
    integers = stream(parts["data"], scheme.bits)[:, :columns] - zeros[:, blocks]
    exact = integers * parts["scales"].astype(np.float64)[:, blocks]
    decoded = scheme.decode(parts, columns)
    np.testing.assert_array_equal(decoded, exact.astype(np.float32))


@pytest.mark.parametrize("scheme", HALVES[:2], ids=lambda s: s.label)
def test_weights_that_float16_cannot_hold_are_refused(scheme):
    levels = 2 ** (scheme.bits - 1) if scheme.symmetric else 2**scheme.bits - 1
    weights = np.ones((2, 26), np.float32)
    weights[1, 3] = -70_000 * levels
    for word in ("rtn", "search", "gptq"):
        with pytest.raises(RequestError, match=r"w: .*need a scale of 7e\+04, and float16 holds"):
            stored(weights, scheme, word, statistics(26))
    with pytest.raises(RequestError, match=r"w: a weight of .*e\+0[56] is more than float16 holds"):
        Float("float16").encode("w", weights)
    with pytest.raises(RequestError, match=r"e\+0[56] exceed float16"):
        Palette(group=2).encode("w", weights)
    weights[1, 3] = -60_000 * levels
    decoded = scheme.decode(scheme.encode("w", weights), 26)
    assert decoded[1, 3] == pytest.approx(weights[1, 3], rel=1e-3)


@st.composite
def matrices(draw):
    """Rows that are whole groups, and their scheme."""
    group, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    shape = (group * groups, draw(st.integers(1, 60)))
    weights = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1000, 1000, width=32)))
    return weights, Palette(group=group, lut=draw(st.sampled_from(["float16", "float32"])))


@given(matrices())
def test_every_weight_is_the_nearest_value_of_its_group(case):
    weights, scheme = case
    parts = scheme.encode("w", weights)
    layout = {name: (part.dtype.name, part.shape) for name, part in parts.items()}
    assert layout == scheme.part_shapes(weights.shape)
    assert (np.diff(parts["lut"].astype(np.float64)) >= 0).all()
    decoded = scheme.decode(parts, weights.shape[1])
    assert decoded.shape == weights.shape and decoded.dtype == np.float32
    tables = parts["lut"].astype(np.float64)[np.arange(len(weights)) // scheme.group]
    distances = np.abs(weights.astype(np.float64)[..., None] - tables[:, None])
    error = np.abs(decoded.astype(np.float64) - weights)
    np.testing.assert_allclose(error, distances.min(2), rtol=1e-5, atol=1e-6)


VALUES = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
)


def squared_error(x, levels):
    """Of every value against the level that is nearest to it."""
    nearest = np.abs(x.astype(np.float64)[:, None] - levels).min(1)
    return float(np.square(nearest).sum())


def least_squared_error(x, count):
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


@settings(max_examples=200)
@given(VALUES, st.integers(1, 17))
def test_few_values_are_clustered_optimally(x, count):
    levels = centers(x, count)
    assert levels.shape == (count,) and (np.diff(levels) >= 0).all()
    noise = 1e-12 * float(np.square(x.astype(np.float64)).sum())
    assert squared_error(x, levels) <= least_squared_error(x, count) * (1 + 1e-9) + noise


def test_a_normal_distribution_gets_the_levels_of_max():
    """J. Max, Quantizing for minimum distortion (1960), table I: 16 levels.

    The least error is flat: levels that are off by a twentieth still have it to a percent.
    """
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    levels = centers(x, 16)
    positive = np.array([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
    published = np.concatenate([-positive[::-1], positive])
    np.testing.assert_allclose(levels, published, rtol=0, atol=0.06)
    error, theirs = squared_error(x, levels), squared_error(x, published)
    assert 0.995 * theirs < error < theirs, "a sample has a better optimum than its distribution"


INT4 = Affine(4, 32, symmetric=False)
SYMMETRIC = Affine(4, 32, symmetric=True, scale="float16")
ASYMMETRIC = Affine(4, 32, symmetric=False, scale="float16")
BYTES = Affine(8, 32, symmetric=True, scale="float16")
WHOLE = Affine(8, None, symmetric=True)
LAYOUTS = [SYMMETRIC, ASYMMETRIC, BYTES, WHOLE, Affine(4, 16, symmetric=True)]


def hessian(k, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / k**0.5 + np.eye(k)
    x = rng.standard_normal((300, k)) @ mix * rng.lognormal(size=k)
    return (x.T @ x / 300).astype(np.float32)


def statistics(k, seed=0):
    return statistics_of([hessian(k, seed)], 300)


def weights(count, k, seed=0):
    return np.random.default_rng(seed).standard_t(5, size=(count, k)).astype(np.float32)


def stored(rows, scheme, word, known):
    scheme = replace(scheme, algorithm=word)
    return scheme.round_trip("w", rows, known, np.arange(len(rows))).astype(np.float64)


def losses(rows, quantized, h):
    return np.einsum("nk,kl,nl->n", rows - quantized, h.astype(np.float64), rows - quantized)


@settings(max_examples=40)
@given(st.sampled_from(LAYOUTS), st.integers(1, 9), st.integers(16, 150), st.integers(0, 99))
def test_never_worse_than_rounding_to_nearest(scheme, count, k, seed):
    rows, known = weights(count, k, seed), statistics(k, seed)
    nearest = stored(rows, scheme, "rtn", None)
    searched = stored(rows, scheme, "search", None)
    for start in range(0, k, scheme.block or k):
        block = np.s_[:, start : start + (scheme.block or k)]
        before, after = (np.square(rows - x)[block].sum(1) for x in (nearest, searched))
        assert (after <= before * (1 + 1e-5) + 1e-9).all()
    h = known.hessians[0].matrix
    weighed, diagonal = stored(rows, scheme, "importance", known), np.diag(np.diagonal(h))
    assert losses(rows, weighed, diagonal).sum() <= losses(rows, nearest, diagonal).sum() * 1.00001
    solved = stored(rows, scheme, "gptq", known)
    assert (losses(rows, solved, h) <= losses(rows, weighed, h) * 1.00001 + 1e-9).all()


@pytest.mark.parametrize(
    ("scheme", "plain"),
    [(SYMMETRIC, "search"), (ASYMMETRIC, "search"), (Palette(group=8), "kmeans")],
)
def test_gains_at_four_bits(scheme, plain):
    """About what the algorithms gain on a trained model: a tenth, and a third of the loss."""
    rows, known = weights(64, 256), statistics(256)
    searched, solved = (stored(rows, scheme, word, known) for word in (plain, "gptq"))
    if plain == "search":
        nearest = stored(rows, scheme, "rtn", None)
        assert np.square(rows - searched).sum() < 0.93 * np.square(rows - nearest).sum()
    h = known.hessians[0].matrix
    assert losses(rows, solved, h).sum() < 0.85 * losses(rows, searched, h).sum()


@pytest.mark.parametrize("scheme", [*LAYOUTS, Palette(group=1)])
def test_rows_are_independent(scheme):
    rows, known = weights(57, 96), statistics(96)
    for word in ("gptq",) if isinstance(scheme, Palette) else ("search", "gptq"):
        whole = stored(rows, scheme, word, known)
        for start, stop in ((0, 1), (1, 50), (50, 57)):
            part = stored(rows[start:stop], scheme, word, known)
            np.testing.assert_array_equal(part, whole[start:stop])
    assert stored(rows[:0], SYMMETRIC, "search", known).shape == (0, 96)


def test_hessians_in_parts_that_no_block_fits():
    """A scale for each row, and H in two parts: the scale stays, the levels still gain."""
    rows, h = weights(20, 90), hessian(90)
    known, both = statistics_of([h[:50, :50], h[50:, 50:]], 300), np.zeros((90, 90), np.float32)
    for part in known.hessians:
        both[part.start : part.stop, part.start : part.stop] = part.matrix
    for scheme in (WHOLE, SYMMETRIC):
        before, after = (
            losses(rows, stored(rows, scheme, w, known), both) for w in ("rtn", "gptq")
        )
        assert (after <= before * 1.00001).all() and after.sum() < 0.9 * before.sum()


HARD = {
    "zeros": np.zeros((3, 64)),
    "outliers": np.where(np.arange(64) % 7 == 0, 1e4, 1.0) * weights(3, 64),
    "denormal": weights(3, 64) * 1e-42,
    "a zero block": np.concatenate([np.zeros((3, 32)), weights(3, 32)], axis=1),
    "one sign": np.abs(weights(3, 64)) + 3,
}


@pytest.mark.parametrize("rows", HARD.values(), ids=HARD)
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, Affine(4, 32, symmetric=True)])
@pytest.mark.parametrize("word", ["search", "gptq"])
def test_hard_weights(rows, scheme, word):
    rows, h = rows.astype(np.float32), hessian(64)
    h[3] = h[:, 3] = 0  # a dead input
    known = statistics_of([h], 1)
    chosen, nearest = (stored(rows, scheme, w, known) for w in (word, "rtn"))
    assert np.isfinite(chosen).all()
    least = known.hessians[0].matrix if word == "gptq" else np.eye(64)
    assert (losses(rows, chosen, least) <= losses(rows, nearest, least) * 1.0001 + 1e-60).all()


def test_the_default_is_search_where_its_library_is(monkeypatch, capsys):
    def algorithms(**plan):
        return [scheme.algorithm for scheme in with_algorithm(plan, None, keep=False).values()]

    others = {"b": Float("float32"), "c": Palette()}
    assert algorithms(a=INT4, **others) == ["search", "cast", "kmeans"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rgexport.kernels.rounding.library.unusable", lambda: "lost")
    assert algorithms(a=INT4, **others) == ["rtn", "cast", "kmeans"]
    assert "rounded to nearest, as the library" in capsys.readouterr().err
    assert algorithms(**others) == ["cast", "kmeans"] and capsys.readouterr().err == ""


@pytest.mark.parametrize("layout", [INT4, Palette(4, 16)])
def test_rows_of_each_kind_go_by_their_own_statistics(layout):
    """Those that share a table by the statistics of the last kind among them."""
    rng = np.random.default_rng(3)
    rows, known = weights(64, 96), [statistics(96, seed) for seed in (0, 1)]
    kind, scheme = rng.integers(0, 2, 100).astype(np.uint8), replace(layout, algorithm="gptq")
    kind[36:52] = 0
    whole = replace(known[0], kinds=RowKinds(kind, tuple(known)))
    parts = scheme.encode("w", rows, whole, ids := np.arange(36, 100))
    if isinstance(layout, Palette):
        kind[52:] = 1
    for value in (0, 1):
        mask = kind[ids] == value
        for label, part in scheme.encode("w", rows[mask], known[value]).items():
            step = len(rows) // len(parts[label])
            np.testing.assert_array_equal(parts[label][mask[::step]], part)


def test_an_unknown_algorithm_can_be_read_but_not_requested():
    later = scheme_from_dict(INT4.to_dict() | {"algorithm": "later-2"})
    assert later == INT4 and hash(later) == hash(INT4)
    with pytest.raises(RequestError, match="'later-2'; expected rtn, search, importance, gptq"):
        later.require_known_algorithm()
