"""Weights are mapped once and become resident; other memory is in huge pages."""

import gc
import mmap
import re
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from rgexport.artifacts.onnx.model_file import ExternalTensor
from rgexport.artifacts.opening import open_artifact
from rgexport.runtimes import huge_pages as module
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.huge_pages import huge_pages
from rgexport.runtimes.onnx import mapped_weights
from rgexport.runtimes.onnx.mapped_weights import MappedWeights

FLOAT32, UINT8, INT64, BFLOAT16 = 1, 2, 7, 16
MIB = 1 << 20
SIZE, PIECE = 40 * MIB, 16 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a folder").mkdir()
    data = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    for name in ("a folder/weights.data", "beside.data"):
        (tmp_path / name).write_bytes(data)
    return tmp_path / "a folder"


def tensor(name: str, kind: int, shape: tuple[int, ...], offset: int, file: str = "weights.data"):
    return ExternalTensor(name, kind, shape, file, offset)


def resident_bytes(path: Path) -> int:
    """Returns what is in memory of all mappings of a file."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = (re.search(r"Rss: +(\d+) kB", entry) for entry in entries if str(path) in entry)
    return 1024 * sum(int(size[1]) for size in sizes if size)


def advising() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.endswith("(_give_all)")]


def make_resident(weights: MappedWeights) -> None:
    weights.make_resident()
    for thread in advising():
        thread.join(20)


def test_values_are_those_of_the_file(folder):
    tensors = [
        tensor("bytes", UINT8, (3, 4), 4096),
        tensor("floats", FLOAT32, (2, 8), 64),
        tensor("halves", BFLOAT16, (2, 8), 64),
    ]
    values = MappedWeights(folder, tensors).values
    data, halves = (folder / "weights.data").read_bytes(), values["halves"]
    assert values["bytes"].numpy().tobytes() == data[4096:4108]
    assert values["floats"].numpy().tobytes() == data[64:128]
    assert values["floats"].shape() == [2, 8] == halves.shape()
    assert halves.data_type() == "tensor(bfloat16)"


def test_what_is_left_to_the_engine(folder):
    tensors = [
        tensor("wrong", UINT8, (3, 6148914691236517206), 0),  # 2 modulo 2^64
        tensor("beyond the end", UINT8, (1, 2), SIZE - 1),
        tensor("before the start", UINT8, (4,), -4),
        tensor("empty", UINT8, (0, 4), 0),
        tensor("of another type", INT64, (4,), 0),
        tensor("elsewhere", UINT8, (4,), 0, "../beside.data"),
        tensor("nowhere", UINT8, (4,), 0, "missing.data"),
        tensor("right", UINT8, (4,), SIZE - 4),
    ]
    assert MappedWeights(folder, tensors).values.keys() == {"right"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of mappings")
def test_all_of_a_file_becomes_resident_once(folder, monkeypatch):
    both = [tensor(name, UINT8, (SIZE,), 0) for name in ("whole", "again")]
    with monkeypatch.context() as patch:
        patch.setattr(mapped_weights, "available_bytes", lambda: SIZE - 1)
        weights = MappedWeights(folder, both)
        make_resident(weights)
        assert resident_bytes(folder / "weights.data") < SIZE / 2
    make_resident(weights)
    assert resident_bytes(folder / "weights.data") == SIZE


def test_large_private_memory_becomes_huge_pages(monkeypatch):
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_collapse", lambda start, end: advised.append((start, end)))
    with huge_pages():
        array = np.ones(64 * MIB, np.uint8)
    for thread in advising():
        thread.join(20)
    first, last = array.ctypes.data, array.ctypes.data + array.size
    covered = sum(max(0, min(end, last) - max(start, first)) for start, end in advised)
    assert covered >= 60 * MIB and all(end - start <= PIECE for start, end in advised)


class Slow:
    """Advice that takes until it is released."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self, start: int, end: int) -> None:
        self.begun.set()
        assert self.release.wait(20)


def test_maps_live_as_long_as_advice_is_given_about_them(tmp_path, monkeypatch):
    """Also when the weights were dropped without `close`."""
    (tmp_path / "weights.data").write_bytes(bytes(8 * MIB))
    slow = Slow()
    monkeypatch.setattr(mapped_weights, "_populate", slow)
    weights = MappedWeights(tmp_path, [tensor("t", UINT8, (8 * MIB,), 0)])
    maps = weakref.ref(next(iter(weights._files.values())))
    weights.make_resident()
    assert slow.begun.wait(20)
    del weights
    gc.collect()
    assert isinstance(maps(), mmap.mmap)
    slow.release.set()
    for thread in advising():
        thread.join(20)
    assert maps() is None


@pytest.mark.parametrize("close", [True, False])
def test_a_session_ends_its_threads(demo_artifact, monkeypatch, close):
    slow = Slow()
    monkeypatch.setattr(mapped_weights, "_populate", slow)
    monkeypatch.setattr(module, "_collapse", slow)
    monkeypatch.setattr(module, "_whole_pages", lambda mappings: iter([(0, 1000 * PIECE)]))
    session = open_session(open_artifact(demo_artifact))
    slow.release.set()
    if close:
        session.close()
    else:
        del session
        gc.collect()
    assert advising() == []
