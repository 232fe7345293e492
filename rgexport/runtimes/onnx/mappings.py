"""What of this process's memory is mapped where; on Linux, elsewhere nothing is told.

Only `/proc/self/maps` says where an engine has put its weights, which `huge_pages` moves.
"""

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Mapping:
    """A piece of the address space."""

    start: int
    end: int
    access: str
    """As the kernel writes it: `rw-p`."""
    offset: int
    """Of `start` in the file."""
    file: str
    """Empty where there is none."""


def mappings() -> Iterator[Mapping]:
    """All that there are now."""
    if sys.platform != "linux":
        return
    try:
        lines = _MAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        addresses, access, offset, _, inode, *file = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        name = file[0] if file and inode != "0" else ""
        yield Mapping(start, end, access, int(offset, 16), name)


def advise(start: int, end: int, advice: int) -> bool:
    """Calls `madvise` on whole pages of the address space; whether the kernel took the advice.

    The numbers of advice are Linux's. Elsewhere none is taken, nor where the C library has no such
    function.
    """
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):
        return False
    return call(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) == 0
