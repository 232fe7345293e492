"""The number of threads for work on processors."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_GROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""All control groups, and the file with the paths of this process's own."""

_jobs: list[int] = []
"""The numbers that `more_jobs` sets, the innermost last."""


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
    with suppress(OSError, ValueError):
        for line in _MINE.read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = _GROUPS / "cpu" if controllers else _GROUPS  # version 1 names controllers
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            folder = top / path.lstrip("/")
            # A container sees no group above `top`.
            for group in (folder, *folder.parents):
                if group.is_relative_to(top):
                    yield from _quota_of(group, files)


def _quota_of(group: Path, files: Sequence[str]) -> Iterator[float]:
    with suppress(OSError, ValueError):  # without a limit: "max", or -1
        time, period = " ".join((group / name).read_text("utf-8") for name in files).split()
        if int(time) > 0 and int(period) > 0:
            yield int(time) / int(period)


def parallel_jobs(most: int | None = None) -> int:
    """Returns the number of threads for jobs: one a processor, up to `most`, or by `more_jobs`."""
    return _jobs[-1] if _jobs else usable_threads(most)


@contextmanager
def more_jobs(count: int) -> Iterator[None]:
    """Lets `parallel_jobs` return `count` or more, for threads that only wait for machines."""
    _jobs.append(max(count, usable_processors()))
    try:
        yield
    finally:
        _jobs.pop()
