"""Memory in huge pages, on Linux: large allocations are moved there, small ones laid together.

A decode step reads all weights once, and all states. In pages of 4 kB it spends a tenth of its time
on address translation. Engines do not ask the kernel for huge pages; afterwards anyone may, by
`madvise(MADV_COLLAPSE)` (Linux 6.1), which copies 1.5 GB in some two seconds. It is advice: it
never changes what is in memory, and where it fails nothing is lost but speed.

A token of a 2B takes 8 % less time with it in ONNX Runtime's own kernels
(`bench/system_tricks.py`), and up to a sixth less in llama.cpp (`docs/llama_cpp.md`). Ours read
mapped files, and have little that could be moved.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import numpy as np

from rgexport.export.storage import aligned
from rgexport.runtimes.onnx.background_advice import BackgroundAdvice
from rgexport.runtimes.onnx.mappings import Mapping, advise, mappings

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_PAGE = 2 << 20
_LEAST = 8 << 20
"""Smaller mappings are not worth a system call."""
_CACHE_LINE = 64


@contextmanager
def huge_pages() -> Iterator[BackgroundAdvice]:
    """Begins to collapse the private memory that was mapped inside the block when it ends.

    Who frees that memory has to stop what this gives before.
    """
    advice, before = BackgroundAdvice(), set(_anonymous())
    yield advice
    mapped = [mapping for mapping in _anonymous() if mapping not in before]
    if mapped:
        advice.start(_whole_pages(mapped), _collapse)


def zeros_together(arrays: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """Zeros of these shapes and dtypes, by name, as parts of one array.

    numpy asks for huge pages from 4 MB on, and a 2B's rings have 2 MB each. Each part begins at a
    cache line, so that no vector that is loaded lies in two.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values()]
    starts = [0, *accumulate(aligned(size, _CACHE_LINE) for size in sizes)]
    memory = np.zeros(starts.pop() + _CACHE_LINE, np.uint8)
    memory = memory[-memory.ctypes.data % _CACHE_LINE :]
    return {
        name: memory[start : start + size].view(dtype).reshape(shape)
        for (name, (shape, dtype)), start, size in zip(arrays.items(), starts, sizes, strict=True)
    }


def _anonymous() -> Iterator[Mapping]:
    """The large writable mappings without a file."""
    for mapping in mappings():
        large = mapping.end - mapping.start >= _LEAST
        if mapping.access == "rw-p" and not mapping.file and large:
            yield mapping


def _whole_pages(found: list[Mapping]) -> Iterator[tuple[int, int]]:
    for mapping in found:
        first = -(-mapping.start // _HUGE_PAGE) * _HUGE_PAGE
        last = mapping.end // _HUGE_PAGE * _HUGE_PAGE
        if first < last:
            yield first, last


def _collapse(start: int, end: int) -> None:
    for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
        advise(start, end, advice)
