import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from rgexport.runtimes.huge_pages import huge_pages

SIZE = 64 << 20


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


def test_memory_of_the_block_is_collapsed() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no transparent huge pages")
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
