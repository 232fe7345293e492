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
from multiprocessing import get_context
from typing import Any

import numpy as np

from rgexport.errors import RequestError

READ_BYTES = 1 << 30
"""More than any processor's cache holds."""
_PASSES = 3

ReadSpeed = Callable[[], float]


@contextmanager
def roofline(threads: int, nbytes: int = READ_BYTES, *, huge: bool = True) -> Iterator[ReadSpeed]:
    """Yields a function that measures, in 0.1 s, how fast `threads` threads together read."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (threads, nbytes, huge))

    def read_speed() -> float:
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


def _prepare(threads: int, nbytes: int, huge: bool) -> None:
    """Initializes the process that reads; only its parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    length = nbytes // threads // 8
    for _ in range(threads):
        memory = np.empty(length, np.uint64) if huge else mmap.mmap(-1, 8 * length)
        _arrays.append(np.frombuffer(memory, np.uint64))
        _arrays[-1].fill(1)  # so that each page is allocated


def _read_speed() -> float:
    with ThreadPoolExecutor(len(_arrays)) as pool:
        passes = (
            seconds(lambda: list(pool.map(np.bitwise_or.reduce, _arrays))) for _ in range(_PASSES)
        )
        return sum(array.nbytes for array in _arrays) / min(passes)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
