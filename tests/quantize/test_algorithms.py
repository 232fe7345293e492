"""The registry of algorithms; an algorithm is no part of a scheme's layout."""

from dataclasses import replace

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.quantize import affine
from rgexport.quantize.algorithms import ALGORITHMS, Importance, encode, require_known
from rgexport.quantize.scheme import (
    Affine,
    Float,
    Ggml,
    Palette,
    scheme_from_dict,
    scheme_to_dict,
)

INT4 = Affine(4, 32, symmetric=False)


def test_what_a_float_cannot_hold_is_named():
    rows = np.array([[1.0, 70_000.0]], np.float32)
    assert encode("w", rows, Float("float32"))["data"][0, 1] == 70_000
    with pytest.raises(RequestError, match="w: a weight of 7e.04 is more than float16 holds"):
        encode("w", rows, Float("float16"))


def test_every_layout_has_an_algorithm():
    assert {layout for layout, _ in ALGORITHMS.values()} == {Float, Affine, Palette, Ggml}


def test_an_algorithm_is_a_row_and_no_part_of_the_layout(monkeypatch: pytest.MonkeyPatch):
    def fill(rows: np.ndarray, scheme: Affine, importance: Importance) -> affine.Parts:
        return affine.encode(rows * importance, scheme)

    monkeypatch.setitem(ALGORITHMS, "halves", (Affine, fill))
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    scheme = replace(INT4, algorithm="halves")
    assert scheme == INT4 and hash(scheme) == hash(INT4)
    assert scheme_from_dict(scheme_to_dict(scheme)).algorithm == "halves"
    found = affine.decode(encode("w", rows, scheme, np.full(64, 0.5, np.float32)), scheme, 64)
    expected = affine.decode(encode("w", rows / 2, INT4), INT4, 64)
    np.testing.assert_array_equal(found, expected)


def test_an_unknown_algorithm_can_be_read_but_not_requested():
    later = scheme_from_dict(scheme_to_dict(INT4) | {"algorithm": "later-2"})
    assert later == INT4
    with pytest.raises(RequestError, match="algorithm = 'later-2'; expected rtn"):
        require_known(later)
    with pytest.raises(RequestError, match="algorithm = 'rtn'; expected kmeans"):
        require_known(Palette(algorithm="rtn"))
    for wrong in (3, "", "a b", "x" * 33):
        with pytest.raises(RequestError, match="algorithm = "):
            scheme_from_dict(scheme_to_dict(INT4) | {"algorithm": wrong})
