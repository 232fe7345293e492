"""Moves large allocations into huge pages, on Linux, in the background.

A decode step reads all weights once. In pages of 4 kB it spends a tenth of its time on address
translation. Engines do not ask the kernel for huge pages; afterwards anyone may, by
`madvise(MADV_COLLAPSE)` (Linux 6.1), which copies 1.5 GB in some two seconds. It is advice: it
never changes what is in memory, and where it fails nothing is lost but speed.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_PAGE = 2 << 20
_LEAST = 8 << 20
"""Smaller mappings are not worth a system call."""

_MAPS = Path("/proc/self/maps")

Mapping = tuple[int, int]
"""First address and end of a private anonymous mapping."""


@contextmanager
def huge_pages() -> Iterator[None]:
    """Begins to collapse the private memory that was mapped inside the block when it ends."""
    before = set(_anonymous_mappings())
    yield
    mapped = [mapping for mapping in _anonymous_mappings() if mapping not in before]
    if mapped:
        threading.Thread(target=_collapse, args=(mapped,), daemon=True).start()


def _anonymous_mappings() -> Iterator[Mapping]:
    """The large writable mappings without a file."""
    if sys.platform != "linux":
        return
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        addresses, access, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if access == "rw-p" and inode == "0" and end - start >= _LEAST:
            yield start, end


def _collapse(mappings: list[Mapping]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in mappings:
        first, last = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE) if first < last else ():
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
