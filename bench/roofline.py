"""How fast this machine reads memory: what a decode step, which reads all weights, cannot beat.

numpy keeps large arrays in huge pages where it can; a plain C loop over 4 kB pages reads a fifth
slower, and would make the shares look as much better.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


class Roofline:
    """Reads `nbytes` of memory with `threads` threads, each its own part."""

    def __init__(self, threads: int, nbytes: int = 1 << 30) -> None:
        self.nbytes = nbytes
        # Written once, so that each page is real.
        self._parts = [np.ones(nbytes // threads // 8, np.uint64) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def best(self, repeats: int = 5) -> float:
        """Bytes per second of the fastest of `repeats` readings."""
        return self.nbytes / min(seconds(self._read) for _ in range(repeats))

    def _read(self) -> None:
        list(self._pool.map(np.bitwise_or.reduce, self._parts))


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
