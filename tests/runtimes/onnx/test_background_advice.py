"""A thread that gives advice holds what the memory belongs to, and ends when it is told to."""

import gc
import mmap
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rgexport.export.onnx.model_file import ExternalTensor
from rgexport.export.opening import open_artifact
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.onnx import huge_pages, mapped_weights, mappings
from rgexport.runtimes.onnx.background_advice import BackgroundAdvice
from rgexport.runtimes.onnx.mapped_weights import MappedWeights
from rgexport.runtimes.onnx.session import OrtSession

PIECE = 16 << 20
LONG = [(0, 1000 * PIECE)]


class Slow:
    """Advice that takes until it is released; counts what was given."""

    def __init__(self) -> None:
        self.begun, self.release, self.given = threading.Event(), threading.Event(), 0

    def __call__(self, start: int, end: int) -> None:
        self.given += 1
        self.begun.set()
        assert self.release.wait(20)


def test_pieces_are_all_of_the_memory():
    given: list[tuple[int, int]] = []
    advice = BackgroundAdvice()
    advice.start([(5, PIECE + 7), (100, 100)], lambda start, end: given.append((start, end)))
    assert advice._thread
    advice._thread.join()
    advice.stop()
    assert given == [(5, PIECE + 5), (PIECE + 5, PIECE + 7)]


def test_stop_waits_for_no_more_than_a_piece():
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


def test_the_thread_holds_the_owner():
    class Owner:
        pass

    slow, advice, owner = Slow(), BackgroundAdvice(), Owner()
    there = weakref.ref(owner)
    advice.start(LONG, slow, owner)
    assert slow.begun.wait(20)
    del owner, advice
    gc.collect()
    assert there() is not None
    slow.release.set()
    (thread,) = [t for t in threading.enumerate() if t.name.endswith("(_give_all)")] or [None]
    if thread:
        thread.join(20)
    assert there() is None


def test_maps_outlive_weights_that_nobody_holds(tmp_path, monkeypatch):
    """Without `close`: addresses stay those of a map for as long as advice is given about them."""
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


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """All advice in the background is slow, and there is some to give."""
    slow = Slow()
    monkeypatch.setattr(mapped_weights, "_populate", slow)
    monkeypatch.setattr(huge_pages, "_collapse", slow)
    monkeypatch.setattr(huge_pages, "_whole_pages", lambda found: iter(LONG))
    return slow


def _advising() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.endswith("(_give_all)")]


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_a_session_ends_its_threads(demo_artifact, advised, close):
    session = open_session(open_artifact(demo_artifact))
    advised.release.set()
    if close:
        session.close()
    else:
        del session
        gc.collect()
    assert _advising() == []


def _no_library(name: object) -> object:
    raise TypeError("bad argument type for built-in operation")  # as on Windows


ABSENT = {"as on Windows": _no_library, "not in the C library": lambda name: object()}


@pytest.mark.parametrize("absent", ABSENT)
def test_a_native_session_needs_no_madvise(demo_artifact, monkeypatch, absent):
    tokens = np.arange(2, 40)[None]
    artifact = open_artifact(demo_artifact)
    expected = OrtSession(artifact).prefill(tokens)
    monkeypatch.setattr(mappings, "ctypes", SimpleNamespace(CDLL=ABSENT[absent]))
    assert not mappings.advise(0, mmap.PAGESIZE, 3)
    session = OrtSession(artifact)
    np.testing.assert_array_equal(session.prefill(tokens), expected)
    session.close()


def test_advice_of_linux_is_not_given_elsewhere(monkeypatch):
    monkeypatch.setattr(mappings, "ctypes", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not mappings.advise(0, mmap.PAGESIZE, 14)


def test_nothing_is_known_of_mappings_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert list(mappings.mappings()) == []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(mappings, "_MAPS", Path("/nowhere"))
    assert list(mappings.mappings()) == []
