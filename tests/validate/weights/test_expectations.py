"""Each algorithm has limits of its own, which sound weights keep and planted faults exceed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.quantize.algorithms import ALGORITHMS
from rgexport.quantize.scheme import Affine, Ggml, Palette
from rgexport.validate.weights.expectations import EXPECTATIONS, expectation_key
from tests.validate.weights.chosen_levels import fed_back, hessian, searched
from tests.validate.weights.stored import complaints, draw, store

LAYOUTS = [
    Affine(4, 32, symmetric=True, scale="float16"),
    Affine(4, 16, symmetric=True),
    Affine(4, 128, symmetric=False, scale="float16"),
    Affine(8, 32, symmetric=True, scale="float16"),
    Affine(8, None, symmetric=True),
]
WEIGHTS = ("normal", "uniform", "heavy", "columns of all sizes")
Store = Callable[[np.ndarray, Affine], np.ndarray]


def _by_importance(w: np.ndarray, scheme: Affine) -> np.ndarray:
    return searched(w, scheme, np.diag(hessian(w.shape[1])))[0]


CHOSEN: dict[str, Store] = {
    "rtn": store,
    "search": lambda w, scheme: searched(w, scheme)[0],
    "importance": _by_importance,
    "gptq": lambda w, scheme: fed_back(w, scheme, hessian(w.shape[1])),
}
"""Key of the expectation → Ŵ."""


def judged(w: np.ndarray, stored: np.ndarray, layout: Affine, key: str) -> list[str]:
    return complaints(w, stored, replace(layout, algorithm=key), weighted=key == "importance")


@pytest.mark.parametrize(
    ("scheme", "weighted", "key"),
    [
        (replace(LAYOUTS[0], algorithm="gptq"), True, "gptq"),
        (replace(LAYOUTS[3], algorithm="gptq"), True, "gptq, 8 bits"),
        (replace(LAYOUTS[3], algorithm="search"), False, "search"),
        (Ggml("f16"), True, "cast"),
        (Ggml("q4_0"), False, "ggml"),
        (Ggml("q4_0"), True, "ggml weighted"),
        (Ggml("q8_0"), True, "ggml"),
        (Ggml("q4_k"), False, "ggml search"),
    ],
)
def test_limits_depend_on_layout_and_algorithm(scheme, weighted, key):
    assert expectation_key(scheme, weighted) == key and key in EXPECTATIONS
    assert ALGORITHMS.keys() <= EXPECTATIONS.keys()


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(list(CHOSEN)),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from([*WEIGHTS, "loud columns", "zeros"]),
    columns=st.integers(2, 12).map(lambda n: 16 * n),
    seed=st.integers(0, 9),
)
def test_sound_weights_pass(key, layout, kind, columns, seed):
    w = draw(kind, (48, columns), seed=seed)
    assert judged(w, CHOSEN[key](w, layout), layout, key) == []


def test_an_algorithm_of_a_later_version_is_one_line():
    w, scheme = draw("normal", (16, 32)), replace(LAYOUTS[0], algorithm="later")
    with pytest.raises(RequestError, match="'later', which this version cannot judge"):
        complaints(w, w, scheme, weighted=False)


def _two_rows(stored: np.ndarray) -> np.ndarray:
    changed = stored.copy()
    changed[[7, 30]] = stored[[30, 7]]
    return changed


FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "all scales times 1.1": lambda stored: np.float32(1.1) * stored,
    "two rows exchanged": _two_rows,
    "rows moved by one": lambda stored: np.roll(stored, 1, axis=0),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("key", CHOSEN)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_planted_faults_are_found(layout, key, fault):
    """By the weights themselves and by their sketches."""
    w = draw("normal", (192, 256))
    stored = CHOSEN[key](w, layout)
    assert judged(w, stored, layout, key) == []
    found = judged(w, FAULTS[fault](stored), layout, key)
    assert {kind.partition(".")[0] for kind in found} == {"weights", "reference"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("algorithm", ["kmeans", "gptq"])
def test_planted_faults_in_palettes(algorithm, fault):
    """Of rows in one group, too, by whatever the table's values were chosen."""
    w, layout = draw("normal", (192, 256)), Palette()
    stored = store(w, layout)
    if algorithm == "gptq":  # indices that differ from the nearest at a seventh of the weights
        moved = np.random.default_rng(0).random(w.shape) < 1 / 7
        stored[moved] = np.roll(stored, 1, axis=1)[moved] * 0 + _next_level(stored)[moved]
    scheme = replace(layout, algorithm=algorithm)
    assert complaints(w, stored, scheme, weighted=True) == []
    found = complaints(w, FAULTS[fault](stored), scheme, weighted=True)
    assert {kind.partition(".")[0] for kind in found} == {"weights", "reference"}


def _next_level(stored: np.ndarray) -> np.ndarray:
    """The level above each weight's own, in its group of sixteen rows."""
    above = stored.copy()
    for start in range(0, len(stored), 16):
        levels = np.unique(stored[start : start + 16])
        place = np.searchsorted(levels, stored[start : start + 16])
        above[start : start + 16] = levels[np.minimum(place + 1, len(levels) - 1)]
    return above


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: layout.label)
def test_a_search_may_make_no_block_worse_than_rounding(layout):
    """One block of thousands whose scale is not the best: nothing else shows it."""
    w = draw("normal", (192, 256))
    stored = CHOSEN["search"](w, layout)
    block = np.s_[17, : layout.block]
    stored[block] *= np.float32(1.25)
    assert judged(w, stored, layout, "search") == ["weights.max_steps"]


def test_a_search_must_make_weights_a_little_smaller():
    """By the squared error: so scales that are two per cent too large are seen in four bits."""
    w, layout = draw("normal", (192, 256)), LAYOUTS[0]
    for gain in (1.02, 0.98):
        stored = CHOSEN["search"](w, layout) * np.float32(gain)
        assert "weights.projection" in judged(w, stored, layout, "search")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["search", "gptq"])
def test_what_is_not_finite_fails(key, bad):
    w, layout = draw("normal", (48, 64)), LAYOUTS[0]
    stored = CHOSEN[key](w, layout)
    stored[3, 5] = bad
    assert "weights.max_steps" in judged(w, stored, layout, key)
