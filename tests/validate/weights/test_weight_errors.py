from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import from_array
from rgexport.quantize.scheme import Affine, Float, Palette, Scheme
from rgexport.validate.weights import weight_errors as module
from rgexport.validate.weights.expectations import MAX_STEPS
from rgexport.validate.weights.weight_errors import check_shapes
from rgexport.validate.weights.weight_limits import weight_checks
from tests.validate.weights.stored import KINDS, draw, error_of, passes, store

SCHEMES: list[Scheme] = [
    *(
        Affine(bits, block, symmetric)
        for bits in (4, 8)
        for block in (32, 128)
        for symmetric in (True, False)
    ),
    Affine(4, 32, symmetric=True, scale="float16"),
    Affine(8, None, symmetric=False, scale="float16"),
    Palette(),
    Palette(lut="float32"),
    Float("float16"),
    Float("float32"),
]
affine_schemes = st.builds(
    Affine,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 32, 64, 128, 12, None]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["float32", "float16"]),
)
palettes = st.builds(Palette, group=st.integers(1, 20), lut=st.sampled_from(["float16", "float32"]))


@settings(max_examples=200, deadline=None)
@given(
    scheme=affine_schemes,
    rows=st.integers(1, 30),
    columns=st.integers(1, 300),
    kind=st.sampled_from(list(KINDS)),
    size=st.sampled_from([1.0, 30.0, 1e-3, 1e-5, 1e-7, 1e-9]),
)
def test_rounding_to_nearest_passes(scheme, rows, columns, kind, size):
    """The smallest are rounded by the smallest numbers that float16 has.

    ONNX Runtime multiplies in float32, Core ML in the dtype of the scales.
    """
    w = draw(kind, (rows, columns), size=size)
    stored = store(w, scheme)
    for seen in (stored, stored.astype(scheme.scale).astype(np.float32)):
        assert error_of(w, seen, scheme).max_steps <= MAX_STEPS


@settings(max_examples=200, deadline=None)
@given(
    scheme=palettes,
    groups=st.integers(1, 3),
    columns=st.integers(1, 300),
    kind=st.sampled_from(list(KINDS)),
    size=st.sampled_from([1.0, 30.0, 1e-3, 1e-7]),
)
def test_a_palette_passes(scheme, groups, columns, kind, size):
    w = draw(kind, (groups * scheme.group, columns), size=size)
    error = error_of(w, store(w, scheme), scheme)
    assert error.grouped and error.searched
    assert error.max_steps <= MAX_STEPS
    if size >= 1e-3:  # where float16 does not have the values, they may be off by any factor
        assert passes(error)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(scheme, "normal") for scheme in SCHEMES]
    + [(scheme, kind) for scheme in SCHEMES[:8] for kind in ("uniform", "loud columns")],
    ids=str,
)
def test_a_scale_that_is_two_percent_off_is_seen(scheme, kind):
    w = draw(kind, (96, 160))
    assert passes(error_of(w, store(w, scheme), scheme))
    for gain in (1.02, 0.98):
        assert not passes(error_of(w, store(w, scheme, gain), scheme))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", SCHEMES[-3:] + SCHEMES[:1], ids=str)
def test_a_stored_value_that_is_not_finite_fails(scheme, bad):
    w = np.ones((16, 64), np.float32)
    wrong = w.copy()
    wrong[2, 5] = bad
    assert not passes(error_of(w, wrong, scheme))


def test_norms_have_the_steps_of_what_is_stored():
    """They are stored with 1 added."""
    w = draw("normal", (1, 500), size=1e-3)[0]
    stored = (w + np.float32(1)) - np.float32(1)
    as_norm, as_it_is = (
        error_of(w, stored, Float("float32"), name=name).max_steps
        for name in ("final_norm.weight", "w")
    )
    assert 0.1 < as_norm <= MAX_STEPS < as_it_is


@pytest.mark.parametrize(
    ("dtype", "source", "steps"),
    [("float32", "float32", 0), ("float32", "float16", 0), ("float16", "float32", 0.5)],
)
def test_floats_are_rounded_once(dtype, source, steps):
    w, scheme = draw("normal", (50, 60)).astype(source).astype(np.float32), Float(dtype)
    assert steps - 0.01 < error_of(w, store(w, scheme), scheme).max_steps <= steps


def test_the_numbers_are_what_they_say():
    w = draw("normal", (40, 96), size=1.0)
    stored = w + draw("normal", (40, 96), size=0.1, seed=1)
    error = error_of(w, stored, Float("float32"))
    wide, other = w.astype(np.float64).ravel(), stored.astype(np.float64).ravel()
    norm = np.linalg.norm
    assert error.relative_error == pytest.approx(norm(wide - other) / norm(wide), rel=1e-6)
    assert error.projection == pytest.approx(wide @ other / (wide @ wide), rel=1e-6)
    assert error.values == w.size


@pytest.mark.parametrize("scheme", [Palette(group=8), Float("float16")], ids=str)
def test_slabs_do_not_matter(scheme, monkeypatch):
    w = draw("heavy", (40, 60))
    stored = store(w, scheme)
    whole = error_of(w, stored, scheme)
    monkeypatch.setattr(module, "_SLAB_BYTES", 3000)
    cut = error_of(w, stored, scheme)
    for number in ("relative_error", "projection", "clipping", "max_steps", "noise", "shift"):
        assert getattr(cut, number) == pytest.approx(getattr(whole, number), rel=1e-12)


def test_a_model_of_another_shape_is_refused():
    tensors = {"a": StoredTensor((4, 8), Float("float32"), {})}
    check_shapes({"a": from_array(np.zeros((4, 8), np.float32))}, tensors)
    with pytest.raises(RequestError, match=r"a has shape \[4, 8\] .* \[4, 9\]"):
        check_shapes({"a": from_array(np.zeros((4, 9), np.float32))}, tensors)
    with pytest.raises(RequestError, match="no tensor a"):
        check_shapes({}, tensors)


def test_the_nearest_tensor_and_every_failing_one_are_named():
    w, scheme = draw("normal", (16, 64)), Affine(4, 32, symmetric=True)
    sound = replace(error_of(w, store(w, scheme), scheme), noise=1.0, shift=0.0, clipping=0)
    table = [
        replace(sound, name=name, max_steps=steps, projection=projection)
        for name, steps, projection in [
            ("a", 0.4, 1.0),
            ("b", 0.49, 1.0),
            ("c", 0.6, 1.02),
            ("d", np.nan, 1.0),
        ]
    ]
    wrong = {check.name for check in weight_checks(table) if not check.passed}
    expected = {"weights.c.max_steps", "weights.d.max_steps", "weights.c.projection"}
    assert wrong == expected
    clean = list(weight_checks(table[:2]))
    assert {c.kind: c.name for c in clean} == {
        "weights.max_steps": "weights.b.max_steps",
        "weights.noise": "weights.a.noise",
        "weights.shift": "weights.a.shift",
        "weights.projection": "weights.a.projection",
    }
    clipped = replace(sound, projection=0.95, clipping=-0.05)
    assert passes(clipped), "clipping is no wrong scale"
