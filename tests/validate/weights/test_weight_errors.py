from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import from_array
from rgexport.quantize import palette
from rgexport.quantize.affine import decode, encode
from rgexport.quantize.scheme import Affine, Float, FloatDtype, Palette, Scheme
from rgexport.validate.weights import weight_errors as weights
from rgexport.validate.weights import weight_limits
from rgexport.validate.weights.weight_errors import WeightError, tensor_error


def stored_as(w: np.ndarray, scheme: Scheme, gain: float = 1.0) -> np.ndarray:
    """Ŵ, with all scales or tables multiplied by `gain`."""
    if isinstance(scheme, Float):
        return (w * np.float32(gain)).astype(scheme.dtype).astype(np.float32)
    if isinstance(scheme, Palette):
        parts = palette.encode(w, scheme)
        parts["lut"] = (parts["lut"] * np.float32(gain)).astype(scheme.lut)
        return palette.decode(parts, scheme, w.shape[1])
    assert isinstance(scheme, Affine)
    parts = encode(w, scheme)
    parts["scales"] = (parts["scales"] * np.float32(gain)).astype(scheme.scale)
    return decode(parts, scheme, w.shape[1])


def error_of(
    w: np.ndarray, scheme: Scheme, gain: float = 1.0, twin: np.ndarray | None = None
) -> WeightError:
    twin = stored_as(w, scheme, gain) if twin is None else twin
    stored = {"w": StoredTensor(w.shape, scheme, {})}
    return weights.weight_errors({"w": from_array(w)}, {"w": from_array(twin)}, stored)[0]


def passes(error: WeightError) -> bool:
    return all(check.passed for check in weight_limits.weight_checks([error]))


schemes = st.builds(
    Affine,
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, 12, None]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["float32", "float16"]),
)
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, s: rng.normal(size=s),
    "uniform": lambda rng, s: rng.uniform(-1, 1, s),
    "heavy": lambda rng, s: rng.standard_t(2, s),
    "two values": lambda rng, s: rng.choice([-0.25, 0.25], s),
    "zeros": lambda rng, s: np.zeros(s),
    "positive": lambda rng, s: rng.uniform(0.5, 0.6, s),
    "loud column": lambda rng, s: rng.normal(size=s) * np.where(np.arange(s[1]) == 1, 30, 1),
    "symmetric": lambda rng, s: rng.choice([-1, 1], s) * rng.uniform(0.9, 1, s),
}


def some_weights(kind: str, rows: int, columns: int, size: float) -> np.ndarray:
    rng = np.random.default_rng(rows * 1000 + columns)
    return (size * KINDS[kind](rng, (rows, columns))).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(
    scheme=schemes,
    rows=st.integers(1, 30),
    columns=st.integers(1, 300),
    kind=st.sampled_from(list(KINDS)),
    size=st.sampled_from([1.0, 30.0, 1e-3, 1e-5, 1e-7, 1e-9]),
)
def test_rounding_to_nearest_is_never_suspected(
    scheme: Affine, rows: int, columns: int, kind: str, size: float
) -> None:
    """The smallest are rounded by the smallest numbers that float16 has."""
    error = error_of(some_weights(kind, rows, columns, size), scheme)
    assert error.max_steps <= weight_limits.MAX_STEPS


@settings(max_examples=200, deadline=None)
@given(
    scheme=st.builds(
        Palette, group=st.integers(1, 20), lut=st.sampled_from(["float16", "float32"])
    ),
    groups=st.integers(1, 3),
    columns=st.integers(1, 300),
    kind=st.sampled_from(list(KINDS)),
    size=st.sampled_from([1.0, 30.0, 1e-3, 1e-7]),
)
def test_a_palette_is_never_suspected(
    scheme: Palette, groups: int, columns: int, kind: str, size: float
) -> None:
    w = some_weights(kind, groups * scheme.group, columns, size)
    error = error_of(w, scheme)
    assert error.grouped and error.searched
    assert error.max_steps <= weight_limits.MAX_STEPS
    if size >= 1e-3:  # where float16 does not have the values, they may be off by any factor
        assert passes(error)


@pytest.mark.parametrize("gain", [0.98, 1.02])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_wrong_palette_is_seen(dtype: FloatDtype, gain: float) -> None:
    w = some_weights("normal", 64, 512, 0.02)
    scheme = Palette(lut=dtype)
    assert passes(error_of(w, scheme))
    assert not passes(error_of(w, scheme, gain))


@pytest.mark.parametrize("scheme", [Palette(), Affine(4, 32, symmetric=True, scale="float16")])
def test_neighbours_that_changed_places_are_seen(scheme: Scheme) -> None:
    """Two nibbles of a byte in one group of sixteen rows."""
    w = some_weights("normal", 64, 512, 0.02)
    twin = stored_as(w, scheme)
    twin[16:32] = twin[16:32].reshape(16, -1, 2)[..., ::-1].reshape(16, -1)
    assert not passes(error_of(w, scheme, twin=twin))


def test_slabs_hold_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    w = some_weights("heavy", 40, 60, 1.0)
    whole = error_of(w, Palette(group=8))
    monkeypatch.setattr(weights, "_SLAB_BYTES", 3000)
    cut = error_of(w, Palette(group=8))
    assert cut.max_steps == pytest.approx(whole.max_steps, rel=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("gain", [0.98, 1.02])
def test_a_wrong_scale_of_float16_is_seen(gain: float, symmetric: bool) -> None:
    w = some_weights("normal", 96, 160, 0.02)
    for bits, block in ((4, 32), (8, None), (8, 32)):
        scheme = Affine(bits, block, symmetric, scale="float16")  # type: ignore[arg-type]
        assert passes(error_of(w, scheme))
        assert not passes(error_of(w, scheme, gain)), scheme.label


def test_what_is_stored_as_something_else_has_steps_of_its_own() -> None:
    """Norms with their 1 added, as Core ML has them."""
    w = some_weights("normal", 1, 500, 1e-3)[0]
    twin = (w + np.float32(1)) - np.float32(1)
    stored = StoredTensor(w.shape, Float("float32"), {})
    as_norm, as_it_is = (
        tensor_error(name, from_array(w), from_array(twin), stored).max_steps
        for name in ("final_norm.weight", "w")
    )
    assert 0.1 < as_norm <= weight_limits.MAX_STEPS < as_it_is


@pytest.mark.parametrize("kind", ["normal", "uniform", "loud column"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
def test_a_scale_that_is_two_percent_off_is_seen(
    bits: int, block: int, symmetric: bool, kind: str
) -> None:
    w = some_weights(kind, 96, 160, 1.0)
    scheme = Affine(bits, block, symmetric)  # type: ignore[arg-type]
    assert passes(error_of(w, scheme))
    for gain in (1.02, 0.98):
        assert not passes(error_of(w, scheme, gain))


def test_one_wrong_row_is_seen() -> None:
    w = np.random.default_rng(2).normal(size=(500, 256)).astype(np.float32)
    scheme = Affine(4, 128, symmetric=True)
    twin = stored_as(w, scheme)
    twin[17] *= np.float32(1.02)
    stored = StoredTensor(w.shape, scheme, {})
    error = tensor_error("w", from_array(w), from_array(twin), stored)
    assert error.projection == pytest.approx(1, abs=3e-3), "hidden in the sum"
    assert error.max_steps > 0.501


def test_the_numbers_are_what_they_say() -> None:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(40, 96)).astype(np.float32)
    twin = w + rng.normal(0, 0.1, w.shape).astype(np.float32)
    stored = StoredTensor(w.shape, Float("float32"), {})
    error = tensor_error("w", from_array(w), from_array(twin), stored)
    wide, wide_twin = w.astype(np.float64).ravel(), twin.astype(np.float64).ravel()
    norm = np.linalg.norm
    assert error.relative_error == pytest.approx(norm(wide - wide_twin) / norm(wide), rel=1e-6)
    assert error.projection == pytest.approx(wide @ wide_twin / (wide @ wide), rel=1e-6)
    assert error.values == w.size


def test_slabs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(4).normal(size=(37, 5, 8)).astype(np.float32)
    stored = StoredTensor(w.shape, Float("float16"), {})
    twin = from_array(w.astype(np.float16))
    whole = tensor_error("w", from_array(w), twin, stored)
    monkeypatch.setattr(weights, "_SLAB_BYTES", 500)
    cut = tensor_error("w", from_array(w), twin, stored)
    numbers = ("relative_error", "projection", "clipping", "max_steps")
    for number in numbers:
        assert getattr(cut, number) == pytest.approx(getattr(whole, number), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "source", "steps"),
    [("float32", "float32", 0), ("float32", "float16", 0), ("float16", "float32", 0.5)],
)
def test_floats_are_rounded_once(dtype: str, source: str, steps: float) -> None:
    w = np.random.default_rng(5).normal(size=(50, 60)).astype(source).astype(np.float32)
    error = error_of(w, Float(dtype))  # type: ignore[arg-type]
    assert error.max_steps <= steps
    assert error.max_steps > steps - 0.01
    assert not passes(error_of(w, Float(dtype), gain=1.02))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_stored_value_that_is_not_finite_fails(bad: float) -> None:
    w = np.ones((4, 64), np.float32)
    twin = w.copy()
    twin[2, 5] = bad
    for scheme in (Affine(4, 32, symmetric=True), Float("float32"), Float("float16")):
        stored = StoredTensor(w.shape, scheme, {})
        assert not passes(tensor_error("w", from_array(w), from_array(twin), stored))


def test_the_table_has_every_tensor_in_order() -> None:
    rng = np.random.default_rng(6)
    arrays = {f"t{i}": rng.normal(size=(20, 32)).astype(np.float32) for i in range(7)}
    scheme = Affine(8, 32, symmetric=False)
    original = {name: from_array(w) for name, w in arrays.items()}
    twin = {name: from_array(stored_as(w, scheme)) for name, w in arrays.items()}
    tensors = {name: StoredTensor((20, 32), scheme, {}) for name in arrays}
    table = weights.weight_errors(original, twin, tensors)
    assert [error.name for error in table] == list(arrays)
    assert {error.scheme for error in table} == {"int8/32 asym"}
    assert all(0.001 < error.relative_error < 0.01 for error in table)


def test_a_model_of_another_shape_is_refused() -> None:
    tensors = {"a": StoredTensor((4, 8), Float("float32"), {})}
    weights.check_shapes({"a": from_array(np.zeros((4, 8), np.float32))}, tensors)
    with pytest.raises(RequestError, match=r"a has shape \[4, 8\] .* \[4, 9\]"):
        weights.check_shapes({"a": from_array(np.zeros((4, 9), np.float32))}, tensors)
    with pytest.raises(RequestError, match="no tensor a"):
        weights.check_shapes({}, tensors)
