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
    for bits in (2, 3, 4, 8)
    for block in (16, 32, 64, 128)
    for symmetric in (True, False)
]
HALVES = [
    Affine(bits, block, symmetric, scale="float16")
    for bits in (2, 3, 4, 8)
    for block in (None, 13, 32)
    for symmetric in (True, False)
]
rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=150),
    elements=st.floats(-1000, 1000, width=32),
)


@given(rows, st.sampled_from(SCHEMES + HALVES))
def test_parts_have_the_declared_layout(weights: np.ndarray, scheme: Affine) -> None:
    parts = affine.encode(weights, scheme)
    declared = affine.part_shapes(weights.shape[1], scheme)

    found = {name: (part.dtype.name, part.shape[1]) for name, part in parts.items()}
    assert found == declared
    assert all(len(part) == len(weights) for part in parts.values())


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(2, (0.3, 0.7)), (3, (0.12, 0.3)), (4, (0.06, 0.13)), (8, (0.003, 0.009))],
    ids=["int2", "int3", "int4", "int8"],
)
def test_error_of_normal_weights(bits: int, expected: tuple[float, float]) -> None:
    weights = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)
    for scheme in (s for s in SCHEMES if s.bits == bits):
        decoded = affine.decode(affine.encode(weights, scheme), scheme, 512)
        error = np.linalg.norm(decoded - weights) / np.linalg.norm(weights)
        assert expected[0] < error < expected[1], scheme


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


def stream(packed: np.ndarray, bits: int) -> np.ndarray:
    """The integers in rows of bytes."""
    single = np.unpackbits(packed, axis=1, bitorder="little")
    whole = single[:, : single.shape[1] // bits * bits].reshape(len(packed), -1, bits)
    return whole @ 2.0 ** np.arange(bits)


@given(rows, st.sampled_from(HALVES))
def test_weights_are_the_products_with_half_precision_scales(
    weights: np.ndarray, scheme: Affine
) -> None:
    parts = affine.encode(weights, scheme)
    columns = weights.shape[1]
    levels = stream(parts["data"], scheme.bits)
    blocks = np.arange(columns) // affine.block_size(columns, scheme)
    zeros = np.full(parts["scales"].shape, 2 ** (scheme.bits - 1))
    if not scheme.symmetric:
        zeros = stream(parts["zero_points"], scheme.bits)
    integers = levels[:, :columns] - zeros[:, blocks]
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
