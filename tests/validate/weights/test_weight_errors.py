"""The weight table, and sketches of weights: sound tensors pass, wrong ones do not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rgexport.artifacts.manifest import StoredTensor
from rgexport.errors import RequestError
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.tensor import from_array
from rgexport.quantize.algorithms.registry import ALGORITHMS
from rgexport.quantize.schemes.registry import Affine, Float, Mixed, Palette, RowGroup, Scheme
from rgexport.quantize.schemes.row_groups import rows_text
from rgexport.quantize.schemes.two_level import TwoLevel
from rgexport.validate.weights.expectations import EXPECTATIONS, MAX_STEPS
from rgexport.validate.weights.sketch import directions, sketch, sketch_shape
from rgexport.validate.weights.sketch_errors import SketchError, sketch_errors
from rgexport.validate.weights.steps import decay_steps
from rgexport.validate.weights.weight_errors import weight_errors
from rgexport.validate.weights.weight_limits import sketch_checks, weight_checks
from tests.row_groups import ASYMMETRIC, INT4, INT8
from tests.validate.weights.stored import (
    KINDS,
    WEIGHTS,
    complaints,
    draw,
    error_of,
    known,
    mixtures,
    passes,
    statistics,
    store,
)

SCHEMES: list[Scheme] = [
    Affine(4, 128, symmetric=False),
    Affine(4, 32, symmetric=True),
    Affine(4, 32, symmetric=True, scale="float16"),
    Affine(8, None, symmetric=True),
    Palette(),
    Float("float16"),
    Float("float32"),
]
BITS, BLOCKS = st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32, 64, 128, 12, None])
FLOATS = st.sampled_from(["float32", "float16"])
schemes = st.builds(Affine, BITS, BLOCKS, symmetric=st.booleans(), scale=FLOATS)
schemes |= st.builds(Palette, group=st.integers(1, 20), lut=FLOATS)


@settings(max_examples=200)
@given(
    scheme=schemes,
    groups=st.integers(1, 9),
    columns=st.integers(1, 300),
    kind=st.sampled_from(list(KINDS)),
    size=st.sampled_from([1.0, 30.0, 1e-3, 1e-5, 1e-7, 1e-9]),
)
def test_rounding_to_nearest_passes(scheme, groups, columns, kind, size):
    """The smallest are rounded by the smallest numbers that float16 has.

    ONNX Runtime multiplies in float32, Core ML in the dtype of the scales.
    """
    if isinstance(scheme, Palette):
        w = draw(kind, (groups * scheme.group, columns), size=size)
        error = error_of(w, store(w, scheme), scheme)
        assert error.grouped and error.searched and error.max_steps <= MAX_STEPS
        assert size < 1e-3 or passes(error)  # float16 may be off by any factor below
        return
    w = draw(kind, (groups, columns), size=size)
    stored = store(w, scheme)
    for seen in (stored, stored.astype(scheme.scale).astype(np.float32)):
        assert error_of(w, seen, scheme).max_steps <= MAX_STEPS


@pytest.mark.parametrize("kind", ["normal", "uniform", "loud columns"])
@pytest.mark.parametrize(
    "scheme", [*SCHEMES, Affine(8, 32, symmetric=False, scale="float16")], ids=str
)
def test_a_scale_that_is_two_percent_off_and_what_is_not_finite_are_seen(scheme, kind):
    w = draw(kind, (96, 160))
    assert passes(error_of(w, store(w, scheme), scheme))
    if kind == "normal" or isinstance(scheme, Affine):
        for gain in (1.02, 0.98):
            assert not passes(error_of(w, store(w, scheme, gain), scheme))
    for bad in (np.nan, np.inf):
        wrong = store(w, scheme).copy()
        wrong[2, 5] = bad
        assert not passes(error_of(w, wrong, scheme))


def test_norms_have_the_steps_of_what_is_stored():
    """They are stored with 1 added."""
    w = draw("normal", (1, 500), size=1e-3)[0]
    stored = (w + np.float32(1)) - np.float32(1)
    as_it_is = error_of(w, stored, Float("float32")).max_steps
    as_norm = error_of(w, stored, Float("float32"), name="final_norm.weight").max_steps
    assert 0.1 < as_norm <= MAX_STEPS < as_it_is


def test_the_numbers_are_what_they_say():
    w = draw("normal", (40, 96), size=1.0)
    stored = w + draw("normal", (40, 96), size=0.1, seed=1)
    error = error_of(w, stored, Float("float32"))
    wide, other = w.astype(np.float64).ravel(), stored.astype(np.float64).ravel()
    norm = np.linalg.norm
    assert error.relative_error == pytest.approx(norm(wide - other) / norm(wide), rel=1e-6)
    assert error.projection == pytest.approx(wide @ other / (wide @ wide), rel=1e-6)
    assert error.values == w.size


def test_the_nearest_tensor_and_every_failing_one_are_named():
    w, scheme = draw("normal", (16, 64)), Affine(4, 32, symmetric=True)
    sound = replace(error_of(w, store(w, scheme), scheme), noise=1.0, shift=0.0, clipping=0)
    values = [("a", 0.4, 1.0), ("b", 0.49, 1.0), ("c", 0.6, 1.02), ("d", np.nan, 1.0)]
    table = [replace(sound, name=n, max_steps=s, projection=p) for n, s, p in values]
    wrong = {check.name for check in weight_checks(table) if not check.passed}
    assert wrong == {"weights.c.max_steps", "weights.d.max_steps", "weights.c.projection"}
    assert {c.kind: c.name for c in weight_checks(table[:2])} == {
        "weights.max_steps": "weights.b.max_steps",
        "weights.noise": "weights.a.noise",
        "weights.shift": "weights.a.shift",
        "weights.projection": "weights.a.projection",
    }
    assert passes(replace(sound, projection=0.95, clipping=-0.05)), "clipping is no wrong scale"


def compared(w: np.ndarray, dequantized: np.ndarray, scheme: Scheme) -> SketchError:
    tensors = {"w": StoredTensor(w.shape, scheme, {})}
    (error,) = sketch_errors(known(w), {"w": from_array(dequantized)}, tensors)
    return error


def failed(error: SketchError) -> dict[str, float]:
    """Kind of each check that failed → how many times its limit the value is."""
    checks = sketch_checks([error])
    return {check.kind: check.value / check.limit for check in checks if not check.passed}


def test_the_directions_are_the_same_everywhere_and_few_for_large_tensors():
    """A file that was captured with one numpy is read with another."""
    others = [[-1, -1, 1, -1, -1], [1, 1, 1, 1, -1], [1, 1, -1, 1, -1]]
    assert directions(5, 3).tolist() == [[1, 1, 1, 1, 1], *others]
    kept, _ = sketch(from_array(draw("normal", (200, 300))))
    assert kept.shape == (200, 7) and kept.dtype == np.float32
    assert sketch_shape((256_000, 2560)).width == 4


def _permuted(w: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).permutation(w.reshape(-1)).reshape(w.shape)


WRONG = [
    (3.0, _permuted),
    (3.0, lambda w: draw("normal", (w.shape[0], w.shape[1]), seed=9)),
    (3.0, lambda w: 0.05 * _permuted(w)),
    (3.0, lambda w: np.roll(w, 1, axis=0)),
    (1.2, lambda w: np.r_[w[:7], w[8:9], w[8:]]),
    (2.0, lambda w: np.float32(1.05) * w),
    (2.0, lambda w: np.float32(0.95) * w),
]
"""How many times its limit a sketch's error is, and what makes tensors wrong."""


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_sketch_gives_nearly_the_same_numbers_and_shows_what_is_wrong(scheme):
    """Unrelated weights are three and more times their limit."""
    w = draw("normal", (512, 384))
    stored = store(w, scheme)
    exact, error = error_of(w, stored, scheme), compared(w, stored, scheme)
    assert error.relative_error == pytest.approx(exact.relative_error, rel=0.1, abs=1e-6)
    assert error.projection == pytest.approx(exact.projection, abs=2e-3)
    if not isinstance(scheme, Float):
        assert error.shift == pytest.approx(exact.shift, abs=1e-4)
    if not isinstance(scheme, Palette):  # whose levels have other distances inside than outside
        assert error.noise == pytest.approx(exact.noise, rel=0.2, abs=0.05)
    assert not failed(error), error
    for factor, make in WRONG:
        factors = failed(compared(w, store(make(w), scheme), scheme))
        assert factors and max(factors.values()) >= factor
    assert failed(compared(w, np.where(w == w.max(), np.nan, stored), scheme))


def test_steps_of_decays():
    """They are stored through softplus, in float32: half a step at most."""
    decay = np.random.default_rng(3).uniform(-12, 2, 4000).astype(np.float32)
    stored = (-8 * np.logaddexp(0, decay.astype(np.float64))).astype(np.float32)
    back = np.log(np.expm1(stored.astype(np.float64) / -8)).astype(np.float32)
    assert 0.1 < (np.abs(back - decay) / decay_steps(decay)).max() <= 0.501


LAYOUTS = [
    Affine(4, 32, symmetric=True, scale="float16"),
    Affine(4, 128, symmetric=False, scale="float16"),
    Affine(8, None, symmetric=True),
]
PLAIN = {Affine: "rtn", Palette: "kmeans"}
CHOSEN = "rtn", "search", "importance", "gptq"  # algorithms that fill these layouts


def chosen(w: np.ndarray, layout: Affine | Palette, key: str) -> np.ndarray:
    """Ŵ as an algorithm chooses it."""
    return store(w, replace(layout, algorithm=key), statistics=statistics(w.shape[1]))


def judged(w: np.ndarray, stored: np.ndarray, layout: Affine | Palette, key: str) -> list[str]:
    return complaints(w, stored, replace(layout, algorithm=key), weighted=key == "importance")


@settings(max_examples=20)
@given(
    key=st.sampled_from(CHOSEN),
    layout=st.sampled_from([*LAYOUTS, Affine(4, 16, True), TwoLevel(4, 32), TwoLevel(6, 64)]),
    kind=st.sampled_from(WEIGHTS),
    columns=st.integers(2, 12).map(lambda n: 16 * n),
    seed=st.integers(0, 9),
)
def test_sound_weights_pass(key, layout, kind, columns, seed):
    # An outlier whose input has almost no importance may be clipped by many steps.
    assume(key in layout.encoders and (kind != "heavy" or key not in ("importance", "gptq")))
    w = draw(kind, (48, columns), seed=seed)
    assert ALGORITHMS.keys() <= EXPECTATIONS.keys()
    assert judged(w, chosen(w, layout, key), layout, key) == []


def test_an_algorithm_of_a_later_version_is_one_line():
    w, scheme = draw("normal", (16, 32)), replace(LAYOUTS[0], algorithm="later")
    with pytest.raises(RequestError, match="'later', which this version cannot judge"):
        complaints(w, w, scheme, weighted=False)


@pytest.fixture
def loud(monkeypatch):
    """The columns that meet inputs a hundred times as large."""
    columns, large = slice(None, None, 64), mixtures(256)
    large[:, columns] *= 100
    monkeypatch.setattr("tests.validate.weights.stored.mixtures", lambda columns: large)
    return columns


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("outlier", [2, 3.5, 8])
def test_outliers_that_meet_the_largest_inputs_may_be_clipped(bits, outlier, loud):
    """By the search for the least squared error, which knows no inputs; more so if it is coarse."""
    w = draw("normal", (192, 256)).copy()
    w[:, loud] *= np.float32(outlier)
    for block in (32, 128):
        scheme = Affine(bits, block, symmetric=True, algorithm="search")
        kinds = complaints(w, store(w, scheme), scheme, weighted=False)
        assert kinds == [] or ((bits, block) != (4, 32) and kinds == ["reference.output"])


def test_columns_of_the_largest_inputs_are_not_made_smaller(loud):
    """A fifth of four columns hides in the noise of four bits, but not in the outputs."""
    w, scheme = draw("normal", (192, 256)), Affine(4, 32, symmetric=True, algorithm="search")
    stored = store(w, scheme).copy()
    stored[:, loud] *= np.float32(0.8)
    kinds = complaints(w, stored, scheme, weighted=False)
    assert {"weights.output", "reference.output"} <= {*kinds}


def test_rows_of_the_embedding_may_favour_lookups():
    """With statistics, rows that are often looked up are not rounded for the head's inputs."""
    w, scheme = draw("normal", (2048, 64)), Affine(4, 32, symmetric=True, algorithm="gptq")
    error = error_of(w, store(w, replace(scheme, algorithm="rtn")), scheme)
    worse = replace(error, weighted=True, output_noise=2.0)
    assert not passes(worse)
    assert passes(replace(worse, name=EMBEDDING))
    assert not passes(replace(worse, name=EMBEDDING, output_noise=6.0))


FAULTS = {
    "all scales times 1.1": lambda stored: np.float32(1.1) * stored,
    "two rows exchanged": lambda stored: stored[[*range(7), 30, *range(8, 30), 7, *range(31, 192)]],
    "rows moved by one": lambda stored: np.roll(stored, 1, axis=0),
}


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        *((layout, key) for layout in LAYOUTS for key in CHOSEN),
        *((Palette(), key) for key in ("kmeans", "gptq")),
    ],
)
def test_planted_faults_are_found(layout, key):
    """By the weights themselves and by their sketches."""
    w = draw("normal", (192, 256))
    stored = chosen(w, layout, key)
    assert judged(w, stored, layout, key) == []
    for name, fault in FAULTS.items():
        kinds = judged(w, fault(stored), layout, key)
        assert {kind.partition(".")[0] for kind in kinds} == {"weights", "reference"}, name


@pytest.mark.parametrize(
    ("layout", "key"), [*((layout, "gptq") for layout in LAYOUTS), (Palette(), "gptq")]
)
def test_weights_that_were_trained_further_are_found(layout, key):
    """All are off by half a step more: levels may be, if the outputs are nearer for it."""
    w = draw("normal", (192, 256))
    stored, rng = chosen(w, layout, key), np.random.default_rng(5)
    half = np.float32(3**0.5 * np.std(store(w, replace(layout, algorithm=PLAIN[type(layout)])) - w))
    stored += half * np.outer(rng.choice([-1, 1], 192), rng.choice([-1, 1], 256)).astype("f4")
    assert {"weights.output", "reference.output"} <= {*judged(w, stored, layout, key)}


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda layout: layout.label)
def test_a_search_may_make_no_block_worse_than_rounding(layout):
    """One block of thousands whose scale is not the best: nothing else shows it."""
    w = draw("normal", (192, 256))
    stored = chosen(w, layout, "search")
    stored[17, : layout.block] *= np.float32(1.25)
    assert judged(w, stored, layout, "search") == ["weights.max_steps"]
    stored[3, 5] = np.nan
    assert "weights.max_steps" in judged(w, stored, layout, "gptq")


ROWS, COLUMNS = 1500, 96
ORDER = np.random.default_rng(0).permutation(ROWS)
FIRST, SECOND = (rows_text(np.sort(ORDER[start : start + 300])) for start in (0, 300))
SPLIT = Mixed((RowGroup(FIRST, INT8), RowGroup(SECOND, ASYMMETRIC), RowGroup(None, INT4)))


def test_slabs_make_no_difference(monkeypatch):
    """Some of them have no row of a group."""
    w = draw("normal", (ROWS, COLUMNS))
    sources = {"w": from_array(w)}, {"w": from_array(store(w, INT4))}
    tensors = {"w": StoredTensor(w.shape, SPLIT, {})}

    def errors():
        return [*weight_errors(*sources, tensors), *sketch_errors(known(w), sources[1], tensors)]

    whole = errors()

    monkeypatch.setattr("rgexport.validate.weights.sketch.SLAB_BYTES", 4 * COLUMNS * 7)
    for one, other in zip(errors(), whole, strict=True):
        for number in ("relative_error", "projection", "noise", "shift"):
            assert getattr(one, number) == pytest.approx(getattr(other, number), rel=1e-6)


@pytest.mark.parametrize(
    ("gains", "failing"),
    [
        ((1, 1, 1), None),
        ((1.03, 1, 1), "int8/32"),
        ((1, 1.04, 1), "int4/32 asym"),
        ((1, 1, 0.97), "int4/32:"),
    ],
)
def test_a_wrong_group_fails_by_its_name(gains, failing):
    """By the steps of its own scheme: the noise of the other groups would hide it."""
    w, tensors = draw("normal", (ROWS, COLUMNS)), {"w": StoredTensor((ROWS, COLUMNS), SPLIT, {})}
    stored = np.empty_like(w)
    groups = SPLIT.row_groups(ROWS)
    for (_, scheme, rows), gain in zip(groups, gains, strict=True):
        stored[rows] = store(w[rows], scheme, gain)
    original, dequantized = ({"w": from_array(array)} for array in (w, stored))
    table = weight_errors(original, dequantized, tensors)
    sketches = sketch_errors(known(w), dequantized, tensors)
    for checks in (weight_checks(table), sketch_checks(sketches)):
        lines = [f"{check.kind}: {check.reason}" for check in checks if not check.passed]
        assert any(failing in line for line in lines) if failing else lines == []
    for error, (_, scheme, rows) in zip(table, groups, strict=True):
        alone = error_of(w[rows], stored[rows], scheme)
        for number in ("relative_error", "projection", "clipping", "max_steps", "noise", "shift"):
            expected = pytest.approx(getattr(alone, number), rel=1e-9, abs=1e-12)
            assert getattr(error, number) == expected
