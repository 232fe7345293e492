"""How much is done at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_jobs: list[int] = []
"""What `more_jobs` asked for, the innermost last."""


def usable_processors() -> int:
    """The number of processors that this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parallel_jobs(most: int | None = None) -> int:
    """The number of threads for independent jobs.

    One for each processor, but `most`; or as many as `more_jobs` says.
    """
    if _jobs:
        return _jobs[-1]
    return min(most or usable_processors(), usable_processors())


@contextmanager
def more_jobs(count: int) -> Iterator[None]:
    """While other machines do the jobs, so many threads wait for them."""
    _jobs.append(max(count, usable_processors()))
    try:
        yield
    finally:
        _jobs.pop()
