"""The number of processors to compute with."""

import os


def usable_processors() -> int:
    """The number of processors that this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
