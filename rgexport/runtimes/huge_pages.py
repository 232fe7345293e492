"""Puts weights and states into huge pages, on Linux.

A decode step reads all weights and states once; in pages of 4 kB it spends a tenth of its time on
address translation (`bench/system_tricks.py`, `docs/amx/llama_cpp.md`). Engines do not ask for huge
pages. `madvise(MADV_COLLAPSE)` (Linux 6.1) does so afterwards, and copies 1.5 GB in about two
seconds; where it fails, only speed is lost. Our kernels read mapped files (`mapped_weights.py`).
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rgexport.artifacts.storage import aligned
from rgexport.griffin.tensor import advise_kernel

Area = tuple[int, int]
"""The first address of some memory, and the first after it."""

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
_HUGE_PAGE = 2 << 20
_LEAST = 8 << 20
"""Bytes of the smallest mapping that is advised; smaller ones gain too little."""
_PIECE = 16 << 20
"""Bytes of one call of madvise: threads that map memory, and `stop`, wait until it returns."""
_CACHE_LINE = 64
_MAPS = Path("/proc/self/maps")


class BackgroundAdvice:
    """A thread that advises the kernel about memory; it must end before the memory is freed.

    `start` and `stop` belong to the thread that owns the memory.
    """

    _thread: threading.Thread | None = None

    def __init__(self) -> None:
        self._stopped = threading.Event()

    def start(
        self, areas: Iterable[Area], give: Callable[[int, int], object], owner: object = None
    ) -> None:
        """Calls `give(start, end)` for pieces of the areas; `owner` is kept alive meanwhile."""
        arguments = (list(areas), give, self._stopped, owner)
        self._thread = threading.Thread(target=_give_all, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the piece that it advises at this moment."""
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
        for piece_start in range(start, end, _PIECE):
            if stopped.is_set():
                return
            piece_end = min(piece_start + _PIECE, end)
            give(piece_start, piece_end)
    del owner


@contextmanager
def huge_pages() -> Iterator[BackgroundAdvice]:
    """Collapses private memory that was mapped in the block; stop this before freeing it."""
    advice = BackgroundAdvice()
    mapped_before = _large_mappings()
    yield advice
    mapped = sorted(_large_mappings() - mapped_before)
    if mapped:
        advice.start(_whole_pages(mapped), _collapse)


def zeros_together(arrays: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """Returns zeros by name, as slices of one array, for name → (shape, dtype).

    One array of 4 MB or more is in huge pages, which numpy asks for; many small ones are not. Each
    slice starts at a cache line.
    """
    starts = {}
    total = 0
    for name, (shape, dtype) in arrays.items():
        starts[name] = total
        total += aligned(_nbytes(shape, dtype), _CACHE_LINE)

    memory = np.zeros(total + _CACHE_LINE, np.uint8)
    memory = memory[-memory.ctypes.data % _CACHE_LINE :]

    zeros = {}
    for name, (shape, dtype) in arrays.items():
        start = starts[name]
        end = start + _nbytes(shape, dtype)
        zeros[name] = memory[start:end].view(dtype).reshape(shape)
    return zeros


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _large_mappings() -> set[Area]:
    """Returns this process's large writable mappings of no file; none except on Linux."""
    mappings: set[Area] = set()
    try:
        lines = _MAPS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return mappings
    for line in lines:
        addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
        first, _, last = addresses.partition("-")
        start = int(first, 16)
        end = int(last, 16)
        if access == "rw-p" and inode == "0" and end - start >= _LEAST:
            mappings.add((start, end))
    return mappings


def _whole_pages(areas: Iterable[Area]) -> Iterator[Area]:
    """Yields the huge pages that lie inside each area."""
    for start, end in areas:  # twice as long as a page, at least
        yield aligned(start, _HUGE_PAGE), end // _HUGE_PAGE * _HUGE_PAGE


def _collapse(start: int, end: int) -> None:
    advise_kernel(start, end, _MADV_HUGEPAGE)
    advise_kernel(start, end, _MADV_COLLAPSE)
