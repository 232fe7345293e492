import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.runtimes.onnx.huge_pages import huge_pages, zeros_together

SIZE = 64 << 20
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)

needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this kernel has no transparent huge pages",
)


def _huge_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"AnonHugePages:\s+(\d+)", rollup)[1])


def _join(before: set[threading.Thread]) -> None:
    """Waits for the threads that a block has started."""
    for thread in set(threading.enumerate()) - before:
        thread.join(20)


def test_contents_stay() -> None:
    threads = set(threading.enumerate())
    with huge_pages():
        array = np.random.default_rng(0).integers(0, 2**63, SIZE // 8)
    expected = array.copy()
    _join(threads)
    np.testing.assert_array_equal(array, expected)


@needs_huge_pages
def test_memory_of_the_block_is_collapsed() -> None:
    before, threads = _huge_bytes(), set(threading.enumerate())
    with huge_pages():
        region = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.write(b"x" * SIZE)
    _join(threads)
    gained = _huge_bytes() - before
    assert region[:: SIZE // 7] == b"x" * 8
    if gained == 0:
        pytest.skip("this kernel refuses to collapse")
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


@needs_huge_pages
def test_arrays_together_are_in_huge_pages() -> None:
    before = _huge_bytes()
    found = zeros_together({str(i): ((1 << 20,), "uint8") for i in range(SIZE >> 20)})
    for array in found.values():
        array.fill(1)
    gained = _huge_bytes() - before
    if gained == 0:
        pytest.skip("this kernel gives no huge pages")
    assert gained >= SIZE // 2
