"""Weights are mapped once, and become resident."""

import mmap
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rgexport.export.onnx.model_file import ExternalTensor
from rgexport.runtimes.onnx import mapped_weights
from rgexport.runtimes.onnx.mapped_weights import MappedWeights

FLOAT32, UINT8, INT64, BFLOAT16 = 1, 2, 7, 16
MIB = 1 << 20
SIZE = 40 * MIB
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of mappings")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "weights.data").write_bytes(data)
    (tmp_path / "beside.data").write_bytes(data)
    return tmp_path / "a folder"


def tensor(name: str, kind: int, shape: tuple[int, ...], offset: int, file: str = "weights.data"):
    return ExternalTensor(name, kind, shape, file, offset)


def resident_bytes(path: Path) -> int:
    """Of all mappings of a file."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = (re.search(r"Rss: +(\d+) kB", entry) for entry in entries if str(path) in entry)
    return 1024 * sum(int(size[1]) for size in sizes if size)


def wait(before: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - before:
        thread.join(20)


def test_values_are_those_of_the_file(folder):
    weights = MappedWeights(
        folder,
        [tensor("bytes", UINT8, (3, 4), 4096), tensor("floats", FLOAT32, (2, 8), 64)],
    )
    data = (folder / "weights.data").read_bytes()
    expected = np.frombuffer(data, np.uint8, 12, 4096).reshape(3, 4)
    np.testing.assert_array_equal(weights.values["bytes"].numpy(), expected)
    floats = weights.values["floats"].numpy()
    assert floats.shape == (2, 8) and floats.tobytes() == data[64:128]


def test_bfloat16_is_mapped_too(folder):
    found = MappedWeights(folder, [tensor("halves", BFLOAT16, (2, 8), 64)]).values["halves"]
    assert (found.data_type(), found.shape()) == ("tensor(bfloat16)", [2, 8])


@pytest.mark.parametrize(
    "wrong",
    [
        tensor("wrong", UINT8, (3, 6148914691236517206), 0),  # 2 modulo 2^64
        tensor("beyond the end", UINT8, (1, 2), SIZE - 1),
        tensor("before the start", UINT8, (4,), -4),
        tensor("empty", UINT8, (0, 4), 0),
        tensor("of another type", INT64, (4,), 0),
        tensor("elsewhere", UINT8, (4,), 0, "../beside.data"),
        tensor("nowhere", UINT8, (4,), 0, "missing.data"),
    ],
    ids=lambda tensor: tensor.name,
)
def test_what_is_left_to_the_engine(folder, wrong):
    right = tensor("right", UINT8, (4,), SIZE - 4)
    assert MappedWeights(folder, [wrong, right]).values.keys() == {"right"}


@LINUX
def test_all_of_a_file_becomes_resident_once(folder):
    threads = set(threading.enumerate())
    both = [tensor("one", UINT8, (SIZE,), 0), tensor("again", UINT8, (SIZE,), 0)]
    weights = MappedWeights(folder, both)
    weights.make_resident()
    wait(threads)
    assert resident_bytes(folder / "weights.data") == SIZE


@LINUX
def test_what_the_engine_will_read_is_there_before(folder):
    weights = MappedWeights(folder, [tensor("one", UINT8, (SIZE,), 0)])
    middle = 21 * MIB + 5
    weights.read_around([tensor("across pages", FLOAT32, (2048,), middle)])
    assert 2 * mmap.PAGESIZE < resident_bytes(folder / "weights.data") < SIZE
    elsewhere = tensor("elsewhere", UINT8, (4,), 0, "../beside.data")
    weights.read_around([elsewhere, tensor("nowhere", UINT8, (4,), 0, "missing.data")])
    assert resident_bytes(folder / "beside.data") == 0


@LINUX
def test_not_where_memory_is_short(folder, monkeypatch):
    monkeypatch.setattr(mapped_weights, "available_bytes", lambda: SIZE - 1)
    threads = set(threading.enumerate())
    weights = MappedWeights(folder, [tensor("one", UINT8, (SIZE,), 0)])
    weights.make_resident()
    wait(threads)
    assert resident_bytes(folder / "weights.data") < SIZE / 2


def test_old_kernels_read_ahead(folder, monkeypatch):
    advice = []

    def refuse(start: int, end: int, kind: int) -> bool:
        advice.append((end - start, kind))
        return kind != mapped_weights._POPULATE_READ

    weights = MappedWeights(folder, [tensor("one", UINT8, (4,), 0)])
    monkeypatch.setattr(mapped_weights, "advise", refuse)
    threads = set(threading.enumerate())
    weights.make_resident()
    wait(threads)
    kinds = mapped_weights._POPULATE_READ, mapped_weights._WILLNEED
    assert advice == [(size * MIB, kind) for size in (16, 16, 8) for kind in kinds]
