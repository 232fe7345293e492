"""What the formats share that keep their weights in one file."""

import time

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.export.manifest import StoredTensor
from rgexport.export.storage import Places, fill, in_order
from rgexport.griffin.tensor import from_array, slab_bounds
from rgexport.quantize.scheme import Float


def one_part(shape, scheme):
    return {"data": (scheme.dtype, shape)}


def test_places_are_aligned_and_follow_each_other():
    places = Places("file", alignment=64, size=64, header=64)
    plan = {name: Float("float16") for name in "abc"}
    shapes = {"a": (3, 5), "b": (32,), "c": (1,)}
    tensors = places.tensors(plan, shapes, one_part)
    offsets = [tensors[name].parts["data"].offset for name in plan]
    assert offsets == [128, 256, 384]  # 30 and 64 bytes are one 64 each, and a header one more
    assert places.size == 386


def test_a_file_is_filled_slab_by_slab_and_told_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SLAB_BYTES", 40)
    weights = {
        name: np.random.default_rng(i).standard_normal((11, 4)).astype(np.float32)
        for i, name in enumerate("ab")
    }
    plan = dict.fromkeys(weights, Float("float32"))
    tensors = Places("file", 32).tensors(plan, {n: w.shape for n, w in weights.items()}, one_part)
    told: dict[str, list[np.ndarray]] = {name: [] for name in weights}

    def encode(
        name: str, rows: np.ndarray, ids: np.ndarray, stored: StoredTensor
    ) -> dict[str, np.ndarray]:
        time.sleep(float(rows[0, 0]) % 1e-3)  # so that slabs are done in any order
        return {"data": rows * 2}

    path = tmp_path / "file"
    path.touch()
    sources = {name: from_array(array) for name, array in weights.items()}
    fill(tmp_path, tensors, sources, encode, lambda name, parts: told[name].append(parts["data"]))
    for name, array in weights.items():
        part = tensors[name].parts["data"]
        found = np.fromfile(path, np.float32, array.size, offset=part.offset)
        np.testing.assert_array_equal(found.reshape(array.shape), array * 2)
        assert len(told[name]) == 6
        np.testing.assert_array_equal(np.concatenate(told[name]), array * 2)


def test_results_come_in_order_and_few_are_in_flight():
    begun = 0

    def jobs():
        nonlocal begun
        for begun in range(100):
            yield lambda index=begun: (time.sleep(0.002 * (index % 3)), index)[1]

    for expected, result in enumerate(in_order(jobs())):
        assert result == expected and begun - result < 40
    assert result == 99


def test_a_job_that_fails_is_told():
    def fail() -> int:
        raise RequestError("no")

    with pytest.raises(RequestError, match="no"):
        list(in_order([lambda: 1, fail, lambda: 2]))


@pytest.mark.parametrize(
    ("rows", "limit", "together", "expected"),
    [
        (10, 40, 1, [(0, 4), (4, 8), (8, 10)]),
        (12, 50, 4, [(0, 4), (4, 8), (8, 12)]),
        (12, 5, 4, [(0, 4), (4, 8), (8, 12)]),
        (8, 1000, 3, [(0, 8)]),
    ],
)
def test_rows_that_belong_together_stay_so(rows, limit, together, expected):
    assert list(slab_bounds(rows, 10, limit, together)) == expected
