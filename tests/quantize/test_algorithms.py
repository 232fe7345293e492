"""The registry of algorithms; an algorithm is no part of a scheme's layout."""

from dataclasses import replace

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.quantize import affine, algorithms
from rgexport.quantize.algorithms import Algorithm, by_default, encode, require_known
from rgexport.quantize.scheme import Affine, Float, Palette, scheme_from_dict, scheme_to_dict
from rgexport.quantize.statistics import Hessian, RowKinds, Statistics, statistics_of

INT4 = Affine(4, 32, symmetric=False)


def test_what_a_float_cannot_hold_is_named():
    rows = np.array([[1.0, 70_000.0]], np.float32)
    assert encode("w", rows, Float("float32"))["data"][0, 1] == 70_000
    with pytest.raises(RequestError, match=r"w: a weight of 7e.04 is more than float16 holds"):
        encode("w", rows, Float("float16"))


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm that needs statistics and makes all weights half as large."""

    def fill(rows: np.ndarray, scheme: Affine, statistics: Statistics | None) -> affine.Parts:
        assert statistics is not None
        return affine.encode(rows * statistics.importance, scheme)

    row = Algorithm({Affine: fill}, "halves", needs_statistics=True)
    monkeypatch.setitem(algorithms.ALGORITHMS, "halves", row)


def test_a_new_algorithm_is_a_row(halves: None):
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    scheme = replace(INT4, algorithm="halves")
    hessian = Hessian(0, np.eye(64, dtype=np.float32))
    known = Statistics(np.full(64, 0.5, np.float32), (hessian,))
    found = affine.decode(encode("w", rows, scheme, known), scheme, 64)
    expected = affine.decode(encode("w", rows / 2, INT4), INT4, 64)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(RequestError, match="w: halves needs statistics of its inputs"):
        encode("w", rows, scheme)


def test_the_default_is_search_where_its_library_is(monkeypatch, capsys):
    plan = {"a": INT4, "b": Float("float32"), "c": Palette()}
    assert [x.algorithm for x in by_default(plan).values()] == ["search", "cast", "kmeans"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("rgexport.kernels.rounding.library.is_there", lambda: False)
    assert [x.algorithm for x in by_default(plan).values()] == ["rtn", "cast", "kmeans"]
    assert "rounded to nearest, as the library" in capsys.readouterr().err
    assert by_default({"b": Float("float32")}) and capsys.readouterr().err == ""


@pytest.mark.parametrize("layout", [INT4, Palette(4, 16)])
def test_rows_of_each_kind_go_by_their_own_statistics(layout):
    """Those that share a table by the statistics of the last kind among them."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, 96)).astype(np.float32)
    inputs = rng.standard_normal((2, 300, 96)) @ rng.standard_normal((2, 96, 96))
    known = [statistics_of([(x.T @ x / 300).astype(np.float32)], 300) for x in inputs]
    kind, scheme = rng.integers(0, 2, 100).astype(np.uint8), replace(layout, algorithm="gptq")
    kind[36:52] = 0
    whole = replace(known[0], kinds=RowKinds(kind, tuple(known)))
    found = encode("w", rows, scheme, whole, ids := np.arange(36, 100))
    if isinstance(layout, Palette):
        kind[52:] = 1
    for value in (0, 1):
        own = kind[ids] == value
        for label, part in encode("w", rows[own], scheme, known[value]).items():
            step = len(rows) // len(found[label])
            np.testing.assert_array_equal(found[label][own[::step]], part)


def test_importance_alone_weighs_the_search():
    """What the columns that count are off by is less than by a plain search, by their weight."""
    rows = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    weighs = np.where(np.arange(64) % 8 == 0, 30, 1).astype(np.float32)
    known = Statistics(weighs, (Hessian(0, np.diag(weighs)),))

    def lost(word: str) -> float:
        scheme = replace(INT4, algorithm=word)
        found = affine.decode(encode("w", rows, scheme, known), scheme, 64)
        return float((weighs * (found - rows) ** 2).sum())

    assert lost("importance") < 0.9 * lost("search")


def test_an_unknown_algorithm_can_be_read_but_not_requested():
    stored = scheme_to_dict(replace(INT4, algorithm="gptq"))
    assert stored["algorithm"] == scheme_from_dict(stored).algorithm == "gptq"
    later = scheme_from_dict(stored | {"algorithm": "later-2"})
    assert later == INT4 and hash(later) == hash(INT4)
    with pytest.raises(
        RequestError, match="algorithm = 'later-2'; expected rtn, search, importance, gptq"
    ):
        require_known(later)
    with pytest.raises(RequestError, match="algorithm = 'rtn'; expected kmeans, gptq"):
        require_known(Palette(algorithm="rtn"))
    for wrong in (3, "", "a b", "x" * 33):
        with pytest.raises(RequestError, match="algorithm = "):
            scheme_from_dict(scheme_to_dict(INT4) | {"algorithm": wrong})
