"""Puts weights and states into huge pages, on Linux.

A decode step reads all weights and states once; in pages of 4 kB it spends a tenth of its time on
address translation (`bench/system_tricks.py`, `docs/amx/llama_cpp.md`). Engines do not ask for huge
pages. `madvise(MADV_COLLAPSE)` (Linux 6.1) does so afterwards, and copies 1.5 GB in about two
seconds; where it fails, only speed is lost. Our kernels read mapped files (`mapped_weights.py`).
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from rgexport.artifacts.storage import aligned
from rgexport.griffin.tensor import advise_kernel

Area = tuple[int, int]
"""The first address of some memory, and the first after it."""

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_PAGE = 2 << 20
_LEAST = 8 << 20  # bytes of the smallest mapping that is advised; smaller ones gain too little
_PIECE = 16 << 20  # bytes of one call: others that map memory, and `stop`, wait for it
_CACHE_LINE = 64
_MAPS = Path("/proc/self/maps")


class BackgroundAdvice:
    """A thread that advises the kernel about memory; it must end before the memory is freed."""

    _thread: threading.Thread | None = None

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def start(
        self, areas: Iterable[Area], give: Callable[[int, int], object], owner: object = None
    ) -> None:
        """Calls `give(start, end)` for pieces of the areas; `owner` is kept alive meanwhile."""
        arguments = list(areas), give, self._stopped, owner
        self._thread = threading.Thread(target=_give_all, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        # The thread itself may be the one that lets the last reference to a session go.
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None


def _give_all(
    areas: list[Area], give: Callable[[int, int], object], stopped: threading.Event, owner: object
) -> None:
    """Holds no reference to the `BackgroundAdvice`, which may be collected while this runs."""
    for start, end in areas:
        for at in range(start, end, _PIECE):
            if stopped.is_set():
                return
            give(at, min(at + _PIECE, end))
    del owner


@contextmanager
def huge_pages() -> Iterator[BackgroundAdvice]:
    """Collapses private memory that was mapped in the block; stop this before freeing it."""
    advice, before = BackgroundAdvice(), _large_mappings()
    yield advice
    if mapped := sorted(_large_mappings() - before):
        advice.start(_whole_pages(mapped), _collapse)


def zeros_together(arrays: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """Returns zeros as slices of one array: numpy asks for huge pages from 4 MB on."""
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values()]
    starts = [0, *accumulate(aligned(size, _CACHE_LINE) for size in sizes)]
    memory = np.zeros(starts.pop() + _CACHE_LINE, np.uint8)
    memory = memory[-memory.ctypes.data % _CACHE_LINE :]
    return {
        name: memory[start : start + size].view(dtype).reshape(shape)
        for (name, (shape, dtype)), start, size in zip(arrays.items(), starts, sizes, strict=True)
    }


def _large_mappings() -> set[Area]:
    mappings = set()
    with suppress(OSError):
        for line in _MAPS.read_text("utf-8", "surrogateescape").splitlines():
            addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            if access == "rw-p" and inode == "0" and end - start >= _LEAST:
                mappings.add((start, end))
    return mappings


def _whole_pages(areas: Iterable[Area]) -> Iterator[Area]:
    for start, end in areas:  # twice as long as a page, at least
        yield aligned(start, _HUGE_PAGE), end // _HUGE_PAGE * _HUGE_PAGE


def _collapse(start: int, end: int) -> None:
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        advise_kernel(start, end, advice)
