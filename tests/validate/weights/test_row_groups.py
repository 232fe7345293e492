"""Row groups are judged one by one, each by the steps of its own scheme."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import from_array
from rgexport.quantize.row_groups import members
from rgexport.quantize.row_ranges import rows_text
from rgexport.quantize.scheme import Affine, Mixed, RowGroup
from rgexport.validate.checks import Check
from rgexport.validate.weights.sketch_errors import SketchError, sketch_errors
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import sketch_checks, weight_checks
from tests.row_groups import ASYMMETRIC, INT4, INT8
from tests.validate.weights.stored import Known, draw, error_of, store

ROWS, COLUMNS = 1500, 96
CHOSEN = np.random.default_rng(0).permutation(ROWS)
SCHEME = Mixed(
    (
        RowGroup(rows_text(np.sort(CHOSEN[:300])), INT8),
        RowGroup(rows_text(np.sort(CHOSEN[300:600])), ASYMMETRIC),
        RowGroup(None, INT4),
    )
)


def stored_by(w: np.ndarray, scheme: Mixed, gains: dict[int, float] | None = None) -> np.ndarray:
    """Ŵ, with the scales of some groups multiplied."""
    found = np.empty_like(w)
    for index, rows in enumerate(members(scheme, len(w))):
        gain = (gains or {}).get(index, 1.0)
        found[rows] = store(w[rows], scheme.groups[index].scheme, gain)
    return found


def table(w: np.ndarray, dequantized: np.ndarray, scheme: Mixed = SCHEME) -> list[WeightError]:
    sources = ({"w": from_array(array)} for array in (w, dequantized))
    return weight_errors(*sources, {"w": StoredTensor(w.shape, scheme, {})})


def sketches(w: np.ndarray, dequantized: np.ndarray) -> list[SketchError]:
    tensors = {"w": StoredTensor(w.shape, SCHEME, {})}
    return sketch_errors(Known(w), {"w": from_array(dequantized)}, tensors)


def failing(checks: list[Check]) -> list[str]:
    return [f"{check.kind}: {check.reason}" for check in checks if not check.passed]


def test_each_group_has_the_numbers_of_a_matrix_of_its_own():
    w = draw("rows of all sizes", (ROWS, COLUMNS))
    dequantized = stored_by(w, SCHEME)
    found = table(w, dequantized)
    assert [e.scheme for e in found] == ["int8/32 (300 rows)", "int4/32 asym (300 rows)", "int4/32"]
    for error, group, rows in zip(found, SCHEME.groups, members(SCHEME, ROWS), strict=True):
        alone = error_of(w[rows], dequantized[rows], group.scheme)
        assert error.name == "w" and error.values == alone.values
        for field in ("relative_error", "projection", "clipping", "max_steps", "noise", "shift"):
            assert getattr(error, field) == pytest.approx(
                getattr(alone, field), rel=1e-9, abs=1e-12
            )


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["normal", "uniform", "heavy", "loud columns"]), seed=st.integers(0, 99)
)
def test_sound_groups_pass(kind, seed):
    w = draw(kind, (ROWS, COLUMNS), seed=seed)
    dequantized = stored_by(w, SCHEME)
    assert not failing(list(weight_checks(table(w, dequantized))))
    assert not failing(list(sketch_checks(sketches(w, dequantized))))


def _swapped(w: np.ndarray) -> np.ndarray:
    """Two frequent rows that changed places."""
    found = stored_by(w, SCHEME)
    a, b = members(SCHEME, ROWS)[0][:2]
    found[[a, b]] = found[[b, a]]
    return found


WRONG: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "scales of the first group": (lambda w: stored_by(w, SCHEME, {0: 1.03}), "int8/32"),
    "scales of the second": (lambda w: stored_by(w, SCHEME, {1: 1.04}), "int4/32 asym"),
    "scales of the last": (lambda w: stored_by(w, SCHEME, {2: 0.97}), "int4/32:"),
    "swapped rows": (_swapped, "int8/32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_group_fails_by_its_name(wrong):
    """What the noise of the other groups would hide."""
    make, where = WRONG[wrong]
    w = draw("normal", (ROWS, COLUMNS))
    dequantized = make(w)
    for checks in (weight_checks(table(w, dequantized)), sketch_checks(sketches(w, dequantized))):
        assert any(where in line for line in failing(list(checks)))


def test_slabs_do_not_matter(monkeypatch):
    """Also where a slab has no row of a group."""
    from rgexport.validate.weights import sketch_errors as sketched
    from rgexport.validate.weights import weight_errors as weighed

    w = draw("normal", (ROWS, COLUMNS))
    front = Mixed((RowGroup("0-99", Affine(8, 128, symmetric=True)), RowGroup(None, INT4)))
    dequantized, split = stored_by(w, front), stored_by(w, SCHEME)
    whole, sketch = table(w, dequantized, front), sketches(w, split)
    monkeypatch.setattr(weighed, "_SLAB_BYTES", 4 * COLUMNS * 7)
    monkeypatch.setattr(sketched, "SLAB_BYTES", 4 * COLUMNS * 7)
    for one, other in zip(table(w, dequantized, front), whole, strict=True):
        assert one.noise == pytest.approx(other.noise, rel=1e-6)
        assert one.max_steps == other.max_steps
    for piece, all_ in zip(sketches(w, split), sketch, strict=True):
        assert piece.noise == pytest.approx(all_.noise, rel=1e-6)
        assert piece.projection == pytest.approx(all_.projection, rel=1e-6)
