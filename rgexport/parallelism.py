"""The number of threads for work on processors."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_GROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""All control groups (version 2), and the file with the path of this process's own."""

_jobs: list[int] = []  # the numbers that `job_count` sets, the innermost last


def usable_processors() -> int:
    """Returns the number of processors of this process; a container's quota counts, rounded."""
    if not hasattr(os, "sched_getaffinity"):  # Linux only
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    quota = min(_quotas(), default=math.inf)
    return allowed if quota >= allowed else max(1, math.floor(quota + 0.5))


def usable_threads(requested: int | None) -> int:
    """Returns the number of threads of an engine: they spin, so at most one a processor."""
    most = usable_processors()
    return min(requested or most, most)


def _quotas() -> Iterator[float]:
    """Yields the limits of this process's control groups and of all above, in processors."""
    with suppress(OSError):
        path = _MINE.read_text("utf-8").partition("0::/")[2].partition("\n")[0]
        for group in (_GROUPS / path, *(_GROUPS / path).parents):
            with suppress(OSError, ValueError, ZeroDivisionError):  # "max" for no limit
                time, period = (group / "cpu.max").read_text("utf-8").split()
                yield int(time) / int(period)


def parallel_jobs(most: int | None = None) -> int:
    """Returns the number of threads for jobs: one a processor, up to `most`, or by `job_count`."""
    return _jobs[-1] if _jobs else usable_threads(most)


@contextmanager
def job_count(count: int) -> Iterator[None]:
    """Lets `parallel_jobs` return `count`, such as more for threads that only wait for machines."""
    _jobs.append(count)
    try:
        yield
    finally:
        _jobs.pop()
