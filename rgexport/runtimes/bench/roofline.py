"""Measures how fast this machine reads memory: the limit of a decode step, which reads all weights.

The memory is read in another process, so that it does not count in the peak of this one.
"""

import mmap
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from rgexport.errors import RequestError

READ_BYTES = 1 << 30
"""More than any processor's cache holds."""
_PASSES = 3
"""Readings of the memory, the fastest of which counts."""

ReadSpeed = Callable[[], float]
"""Measures the read speed, in bytes per second."""


@contextmanager
def roofline(threads: int, nbytes: int = READ_BYTES, *, huge: bool = True) -> Iterator[ReadSpeed]:
    """Yields a function that measures, in 0.1 s, how fast `threads` threads together read."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (threads, nbytes, huge))

    def read_speed() -> float:
        """Returns bytes per second; raises RequestError if the machine's memory is too small."""
        try:
            return pool.submit(_read_speed).result()
        except BrokenProcessPool:
            raise RequestError(
                f"measuring the memory's read speed takes {nbytes >> 20} MiB beside the model, "
                "which this machine does not have; close other programs"
            ) from None

    try:
        yield read_speed
    finally:
        pool.shutdown(cancel_futures=True)


_arrays: list[np.ndarray] = []
"""The memory that is read, an array for each thread; only the other process fills it."""


def _prepare(threads: int, nbytes: int, huge: bool) -> None:
    """Initializes the process that reads; only its parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    length = nbytes // threads // 8
    for _ in range(threads):
        if huge:
            array = np.empty(length, np.uint64)
        else:
            array = np.frombuffer(mmap.mmap(-1, 8 * length), np.uint64)
        array.fill(1)  # so that each page is allocated
        _arrays.append(array)


def _read_speed() -> float:
    """Returns the bytes per second that all threads together read."""
    nbytes = sum(array.nbytes for array in _arrays)
    with ThreadPoolExecutor(len(_arrays)) as pool:
        read_all = partial(_read_arrays, pool)
        fastest = min(seconds(read_all) for _ in range(_PASSES))
    return nbytes / fastest


def _read_arrays(pool: ThreadPoolExecutor) -> None:
    """Reads every array once, each in a thread of its own."""
    for _ in pool.map(np.bitwise_or.reduce, _arrays):
        pass  # waits for the next thread


def seconds(call: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
