"""The most memory that a process has held."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resource import struct_rusage


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
