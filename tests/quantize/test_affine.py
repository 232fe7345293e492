import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.quantize import affine
from rgexport.quantize.scheme import Affine

SCHEMES = [
    Affine(bits, block, symmetric)
    for bits in (4, 8)
    for block in (32, 64, 128)
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


@given(rows, st.sampled_from(SCHEMES))
def test_parts_have_the_declared_layout(weights: np.ndarray, scheme: Affine) -> None:
    parts = affine.encode(weights, scheme)
    declared = affine.part_shapes(weights.shape[1], scheme)

    found = {name: (part.dtype.name, part.shape[1]) for name, part in parts.items()}
    assert found == declared
    assert all(len(part) == len(weights) for part in parts.values())


@given(rows, st.sampled_from(SCHEMES), st.data())
def test_rows_stand_for_themselves(
    weights: np.ndarray, scheme: Affine, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(weights)))
    whole = affine.encode(weights, scheme)
    pieces = [affine.encode(weights[s], scheme) for s in (np.s_[:cut], np.s_[cut:])]
    for name, part in whole.items():
        np.testing.assert_array_equal(part, np.concatenate([p[name] for p in pieces]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_what_was_quantized_once_stays_as_it_is(scheme: Affine) -> None:
    weights = np.random.default_rng(0).standard_normal((40, 200)).astype(np.float32)
    once = affine.decode(affine.encode(weights, scheme), scheme, 200)
    twice = affine.decode(affine.encode(once, scheme), scheme, 200)
    # An asymmetric range may shrink by a level when its zero point was rounded.
    steps = np.abs(affine.encode(weights, scheme)["scales"]).max()
    np.testing.assert_allclose(twice, once, atol=(1e-6 if scheme.symmetric else 0.51 * steps))


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
    for scheme in SCHEMES:
        parts = affine.encode(np.zeros((2, 33), np.float32), scheme)
        assert np.isfinite(parts["scales"]).all()
        assert not affine.decode(parts, scheme, 33).any()
