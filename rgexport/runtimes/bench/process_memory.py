"""The memory that a process holds, and the most that it has held."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resource import struct_rusage


_STATM = Path("/proc/self/statm")


def rss_bytes() -> int | None:
    """What this process holds now; None where the system does not tell (only Linux does)."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int | None:
    """The peak of this process since it began; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF))


def peak_bytes(usage: "struct_rusage") -> int:
    """The peak of a process, whose unit depends on the system."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
