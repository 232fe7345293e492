"""Memory in huge pages, and the thread that asks for them."""

import gc
import mmap
import re
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.export.onnx.model_file import ExternalTensor
from rgexport.export.opening import open_artifact
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.onnx import huge_pages as module
from rgexport.runtimes.onnx import mapped_weights
from rgexport.runtimes.onnx.huge_pages import BackgroundAdvice, huge_pages, zeros_together
from rgexport.runtimes.onnx.mapped_weights import MappedWeights

SIZE, PIECE = 64 << 20, 16 << 20
MADV_COLLAPSE = 25
"""Linux 6.1; Python has no name for it."""
LONG = [(0, 1000 * PIECE)]
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)

needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this kernel has no transparent huge pages",
)


def _huge_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"AnonHugePages:\s+(\d+)", rollup)[1])


def _kernel_gives(advice: int) -> bool:
    """Returns whether memory gets huge pages by this advice, without any code of ours."""
    before = _huge_bytes()
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        for is_filled in (False, True):
            with suppress(OSError):
                region.madvise(advice)
            if not is_filled:
                region.write(b"x" * SIZE)
        return _huge_bytes() > before


@needs_huge_pages
@pytest.mark.parametrize("way", ["collapsed", "together"])
def test_memory_is_in_huge_pages(way: str) -> None:
    before, threads = _huge_bytes(), set(threading.enumerate())
    if way == "together":
        arrays = zeros_together({str(i): ((1 << 20,), "uint8") for i in range(SIZE >> 20)})
        for array in arrays.values():
            array.fill(1)
    else:
        with huge_pages():
            region = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            region.write(b"xyz" * (SIZE // 3))
        for thread in set(threading.enumerate()) - threads:
            thread.join(20)
        assert region[: SIZE // 3 * 3] == b"xyz" * (SIZE // 3)
    gained = _huge_bytes() - before
    advice = MADV_COLLAPSE if way == "collapsed" else mmap.MADV_HUGEPAGE
    if gained == 0 and not _kernel_gives(advice):
        pytest.skip("this kernel gives no huge pages")
    assert gained >= SIZE // 2


@given(st.lists(st.tuples(SHAPES, st.sampled_from(["float32", "float16", "int64"])), max_size=6))
def test_arrays_together_share_nothing_but_the_memory(arrays: list) -> None:
    named = {str(index): array for index, array in enumerate(arrays)}
    found = zeros_together(named)
    assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == named
    assert not any(array.any() for array in found.values())
    assert all(array.ctypes.data % 64 == 0 for array in found.values() if array.size)
    for index, array in enumerate(found.values()):
        array.fill(index)
    for index, array in enumerate(found.values()):
        np.testing.assert_array_equal(array, index)


class Slow:
    """Advice that takes until it is released; counts what was given."""

    def __init__(self) -> None:
        self.begun, self.release, self.given = threading.Event(), threading.Event(), 0

    def __call__(self, start: int, end: int) -> None:
        self.given += 1
        self.begun.set()
        assert self.release.wait(20)


def test_pieces_are_all_of_the_memory() -> None:
    given: list[tuple[int, int]] = []
    advice = BackgroundAdvice()
    advice.start([(5, PIECE + 7), (100, 100)], lambda start, end: given.append((start, end)))
    assert advice._thread
    advice._thread.join()
    advice.stop()
    assert given == [(5, PIECE + 5), (PIECE + 5, PIECE + 7)]


def test_stop_waits_for_no_more_than_a_piece() -> None:
    slow, advice = Slow(), BackgroundAdvice()
    advice.start(LONG, slow)
    assert slow.begun.wait(20)
    stopping = threading.Thread(target=advice.stop)
    stopping.start()
    assert stopping.is_alive() and slow.given == 1
    while not advice._stopped.is_set():
        pass
    slow.release.set()
    stopping.join(20)
    assert not stopping.is_alive() and slow.given == 1
    advice.stop()  # again


def test_maps_live_as_long_as_advice_is_given_about_them(tmp_path, monkeypatch):
    """Also when the weights were dropped without `close`."""
    (tmp_path / "weights").write_bytes(bytes(8 << 20))
    slow = Slow()
    monkeypatch.setattr(mapped_weights, "_populate", slow)
    weights = MappedWeights(tmp_path, [ExternalTensor("t", 2, (8 << 20,), "weights", 0)])
    maps = weakref.ref(next(iter(weights._files.values())))
    weights.make_resident()
    assert slow.begun.wait(20)
    del weights
    gc.collect()
    assert isinstance(maps(), mmap.mmap)
    slow.release.set()
    for thread in _advising():
        thread.join(20)
    assert maps() is None


def _advising() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.endswith("(_give_all)")]


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_a_session_ends_its_threads(demo_artifact, monkeypatch, close):
    slow = Slow()
    monkeypatch.setattr(mapped_weights, "_populate", slow)
    monkeypatch.setattr(module, "_collapse", slow)
    monkeypatch.setattr(module, "_whole_pages", lambda found: iter(LONG))
    session = open_session(open_artifact(demo_artifact))
    slow.release.set()
    if close:
        session.close()
    else:
        del session
        gc.collect()
    assert _advising() == []


def _no_library(name: object) -> object:
    raise TypeError("bad argument type for built-in operation")  # as on Windows


@pytest.mark.parametrize(
    ("system", "ctypes"),
    [
        ("darwin", None),
        ("linux", SimpleNamespace(CDLL=_no_library)),
        ("linux", SimpleNamespace(CDLL=lambda name: object())),
    ],
    ids=["another system", "no C library", "not in the C library"],
)
def test_where_no_advice_is_taken(demo_artifact, monkeypatch, system, ctypes):
    """Neither where mappings are not listed; a session works all the same."""
    tokens, artifact = np.arange(2, 40)[None], open_artifact(demo_artifact)
    expected = open_session(artifact).prefill(tokens)
    monkeypatch.setattr(module, "ctypes", ctypes)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        assert not module.advise(0, mmap.PAGESIZE, 14)
    monkeypatch.setattr(module, "_MAPS", Path("/nowhere"))
    assert module._large_mappings() == set()
    if ctypes:
        session = open_session(artifact)
        np.testing.assert_array_equal(session.prefill(tokens), expected)
        session.close()
