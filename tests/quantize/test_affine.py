import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.quantize import affine
from rgexport.quantize.scheme import Affine

SCHEMES = [
    Affine(bits, block, symmetric)
    for bits in (4, 8)
    for block in (32, 64, 128)
    for symmetric in (True, False)
]
HALVES = [
    Affine(bits, block, symmetric, scale="float16")
    for bits in (4, 8)
    for block in (None, 13, 32)
    for symmetric in (True, False)
]
rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=150),
    elements=st.floats(-1000, 1000, width=32),
)


@given(rows, st.sampled_from(SCHEMES))
def test_every_weight_is_within_one_step(weights: np.ndarray, scheme: Affine) -> None:
    parts = affine.encode(weights, scheme)
    decoded = affine.decode(parts, scheme, weights.shape[1])

    steps = np.abs(parts["scales"]).repeat(scheme.block, axis=1)[:, : weights.shape[1]]
    assert decoded.dtype == np.float32
    # Half a step; a whole one at the end of the range that has a level less, or is rounded.
    assert (np.abs(decoded - weights) <= steps * 1.001 + 1e-30).all()


@given(rows, st.sampled_from(SCHEMES + HALVES))
def test_parts_have_the_declared_layout(weights: np.ndarray, scheme: Affine) -> None:
    parts = affine.encode(weights, scheme)
    declared = affine.part_shapes(weights.shape[1], scheme)

    found = {name: (part.dtype.name, part.shape[1]) for name, part in parts.items()}
    assert found == declared
    assert all(len(part) == len(weights) for part in parts.values())


@given(rows, st.sampled_from(SCHEMES + HALVES), st.data())
def test_rows_are_independent(weights: np.ndarray, scheme: Affine, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(weights)))
    whole = affine.encode(weights, scheme)
    pieces = [affine.encode(weights[s], scheme) for s in (np.s_[:cut], np.s_[cut:])]
    for name, part in whole.items():
        np.testing.assert_array_equal(part, np.concatenate([p[name] for p in pieces]))


@pytest.mark.parametrize(
    ("bits", "expected"), [(4, (0.07, 0.13)), (8, (0.004, 0.009))], ids=["int4", "int8"]
)
def test_error_of_normal_weights(bits: int, expected: tuple[float, float]) -> None:
    weights = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)
    for scheme in (s for s in SCHEMES if s.bits == bits):
        decoded = affine.decode(affine.encode(weights, scheme), scheme, 512)
        error = np.linalg.norm(decoded - weights) / np.linalg.norm(weights)
        assert expected[0] < error < expected[1], scheme


def test_zeros_stay_zeros() -> None:
    for scheme in SCHEMES + HALVES:
        parts = affine.encode(np.zeros((2, 33), np.float32), scheme)
        assert np.isfinite(parts["scales"]).all()
        assert not affine.decode(parts, scheme, 33).any()


@given(rows, st.sampled_from(HALVES))
def test_half_precision_scales_reach_every_weight(weights: np.ndarray, scheme: Affine) -> None:
    """They are rounded away from zero: only a level that is missing on one side may clip."""
    parts = affine.encode(weights, scheme)
    scales = np.abs(parts["scales"].astype(np.float64))
    block = affine.block_size(weights.shape[1], scheme)
    spread = scales.repeat(block, axis=1)[:, : weights.shape[1]]
    starts = np.arange(0, weights.shape[1], block)
    wide = weights.astype(np.float64)
    if scheme.symmetric:
        reach = np.maximum.reduceat(np.abs(wide), starts, axis=1) / 2 ** (scheme.bits - 1)
    else:
        high = np.maximum(np.maximum.reduceat(wide, starts, axis=1), 0)
        reach = (high - np.minimum(np.minimum.reduceat(wide, starts, axis=1), 0)) / (
            2**scheme.bits - 1
        )
    used = scales != 1
    assert (scales >= reach * (1 - 1e-6))[used].all()
    assert (scales <= np.maximum(reach * (1 + 2**-10 + 1e-6), 2**-24 * 1.000001 + reach))[
        used
    ].all()

    error = np.abs(affine.decode(parts, scheme, weights.shape[1]) - wide)
    missing = np.maximum(np.abs(wide) - (2 ** (scheme.bits - 1) - 1.5) * spread, 0)
    assert (error <= spread * 0.5001 + (missing if scheme.symmetric else 0)).all()


@given(rows, st.sampled_from(HALVES))
def test_weights_are_the_products_with_half_precision_scales(
    weights: np.ndarray, scheme: Affine
) -> None:
    parts = affine.encode(weights, scheme)
    columns = weights.shape[1]
    bytes_ = parts["data"]
    if scheme.bits == 4:
        bytes_ = np.stack([bytes_ & 15, bytes_ >> 4], 2).reshape(len(bytes_), -1)
    blocks = np.arange(columns) // affine.block_size(columns, scheme)
    zeros = np.full(parts["scales"].shape, 2 ** (scheme.bits - 1))
    if not scheme.symmetric:
        packed = parts["zero_points"]
        if scheme.bits == 4:
            packed = np.stack([packed & 15, packed >> 4], 2).reshape(len(packed), -1)
        zeros = packed[:, : zeros.shape[1]]
    integers = bytes_[:, :columns].astype(np.float64) - zeros[:, blocks]
    exact = integers * parts["scales"].astype(np.float64)[:, blocks]
    decoded = affine.decode(parts, scheme, columns)
    np.testing.assert_array_equal(decoded, exact)


def test_the_smallest_weights_do_not_underflow() -> None:
    """Where a scale of float32 would round to zero, the smallest of float16 takes its place."""
    weights = np.float32([[1e-9, -3e-8, 5e-8, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for scheme in HALVES:
        parts = affine.encode(weights, scheme)
        assert (parts["scales"] != 0).all() and np.isfinite(parts["scales"]).all()
        decoded = affine.decode(parts, scheme, 4)
        assert (np.abs(decoded - weights) <= 2.0**-25).all()
        assert not decoded[1].any()


@pytest.mark.parametrize("scheme", HALVES, ids=lambda s: s.label)
def test_what_float16_cannot_hold_is_refused(scheme: Affine) -> None:
    levels = 2 ** (scheme.bits - 1) if scheme.symmetric else 2**scheme.bits - 1
    weights = np.ones((2, 26), np.float32)
    weights[1, 3] = -70_000 * levels
    with pytest.raises(RequestError, match=r"need a scale of 7e\+04, and float16 holds at most"):
        affine.encode(weights, scheme)
    weights[1, 3] = -60_000 * levels
    decoded = affine.decode(affine.encode(weights, scheme), scheme, 26)
    assert decoded[1, 3] == pytest.approx(weights[1, 3], rel=1e-3)
    assert affine.encode(np.zeros((0, 26), np.float32), scheme)["scales"].shape[0] == 0


def test_one_scale_a_row() -> None:
    weights = np.random.default_rng(2).standard_normal((30, 77)).astype(np.float32)
    scheme = Affine(8, None, symmetric=True)
    as_block = Affine(8, 77, symmetric=True)
    for name, part in affine.encode(weights, scheme).items():
        np.testing.assert_array_equal(part, affine.encode(weights, as_block)[name])
    assert affine.encode(weights, scheme)["scales"].shape == (30, 1)
    assert scheme.label == "int8/row"
    assert scheme.bits_per_weight == 8
    assert Affine(4, 32, symmetric=True, scale="float16").bits_per_weight == 4.5
