"""Sketches find what the weights themselves would: sound tensors pass, each wrong one does not."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import from_array
from rgexport.quantize.scheme import Affine, Float, Palette, Scheme
from rgexport.validate.weights.sketch import directions, sketch, sketch_shape
from rgexport.validate.weights.sketch_errors import SketchError, sketch_errors
from rgexport.validate.weights.weight_limits import sketch_checks
from tests.validate.weights.stored import Known, draw, error_of, store

SCHEMES: list[Scheme] = [
    Affine(4, 128, symmetric=False),
    Affine(4, 32, symmetric=True),
    Affine(4, 32, symmetric=True, scale="float16"),
    Affine(8, None, symmetric=True),
    Palette(),
    Float("float16"),
    Float("float32"),
]
WEIGHTS = ("normal", "uniform", "heavy", "zeros", "loud columns", "rows of all sizes")


def compared(w: np.ndarray, dequantized: np.ndarray, scheme: Scheme) -> SketchError:
    tensors = {"w": StoredTensor(w.shape, scheme, {})}
    (found,) = sketch_errors(Known(w), {"w": from_array(dequantized)}, tensors)
    return found


def failed(error: SketchError) -> dict[str, float]:
    """Kind of each check that failed → how many times its limit the value is."""
    checks = sketch_checks([error])
    return {check.kind: check.value / check.limit for check in checks if not check.passed}


def test_the_directions_are_the_same_everywhere():
    """A file that was captured with one numpy is read with another."""
    found = directions(5, 3)
    assert found[0].tolist() == [1, 1, 1, 1, 1]
    assert found[1:].tolist() == [[-1, -1, 1, -1, -1], [1, 1, 1, 1, -1], [1, 1, -1, 1, -1]]


def test_what_is_kept_of_a_shape():
    shapes = {
        (256_000, 2560): (256_000, 4),
        (200, 300): (200, 7),
        (40, 24): (40, 24),
        (96,): (96, 1),
        (64, 1, 4): (64, 4),
        (10, 256, 256): (2560, 4),
    }
    found = {shape: sketch_shape(shape) for shape in shapes}
    assert {shape: (one.rows, one.width) for shape, one in found.items()} == shapes
    for shape in ((200, 300), (40, 24)):
        kept, _ = sketch(from_array(draw("normal", shape)))
        assert kept.shape == shapes[shape] and kept.dtype == np.float32


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_a_sketch_gives_nearly_the_same_numbers(scheme):
    w = draw("normal", (512, 384))
    stored = store(w, scheme)
    exact, found = error_of(w, stored, scheme), compared(w, stored, scheme)
    assert found.relative_error == pytest.approx(exact.relative_error, rel=0.1, abs=1e-6)
    assert found.projection == pytest.approx(exact.projection, abs=2e-3)
    if not isinstance(scheme, Float):
        assert found.shift == pytest.approx(exact.shift, abs=1e-4)
    if not isinstance(scheme, Palette):  # whose levels have other distances inside than outside
        assert found.noise == pytest.approx(exact.noise, rel=0.2, abs=0.05)


@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    kind=st.sampled_from(WEIGHTS),
    groups=st.integers(1, 20),
    columns=st.integers(2, 20).map(lambda n: 16 * n),
    seed=st.integers(0, 9),
)
def test_a_sound_tensor_passes(scheme, kind, groups, columns, seed):
    w = draw(kind, (16 * groups, columns), seed=seed)
    found = compared(w, store(w, scheme), scheme)
    assert not failed(found), found


def _permuted(w: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).permutation(w.reshape(-1)).reshape(w.shape)


def _other_row(w: np.ndarray) -> np.ndarray:
    changed = w.copy()
    changed[7] = w[8]
    return changed


WRONG: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "shuffled": (_permuted, 3.0),
    "other values": (lambda w: draw("normal", (w.shape[0], w.shape[1]), seed=9), 3.0),
    "a twentieth of other values": (lambda w: 0.05 * _permuted(w), 3.0),
    "rows shifted": (lambda w: np.roll(w, 1, axis=0), 3.0),
    "one row exchanged": (_other_row, 1.2),
    "times 1.05": (lambda w: np.float32(1.05) * w, 2.0),
    "times 0.95": (lambda w: np.float32(0.95) * w, 2.0),
    "not a number": (lambda w: np.where(w == w.max(), np.nan, w), 0.0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_a_wrong_tensor_fails(scheme, wrong):
    """Unrelated weights are three and more times their limit."""
    w = draw("normal", (512, 384))
    make, factor = WRONG[wrong]
    stored = make(store(w, scheme)) if wrong == "not a number" else store(make(w), scheme)
    found = failed(compared(w, stored, scheme))
    assert found and not max(found.values()) < factor, found
