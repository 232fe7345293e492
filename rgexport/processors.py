"""How many processors there are to compute with."""

import os


def usable_processors() -> int:
    """The processors that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
