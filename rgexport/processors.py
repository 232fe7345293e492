"""How much is done at once."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_GROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's control groups, and those of this process."""

_jobs: list[int] = []
"""What `more_jobs` asked for, the innermost last."""


def usable_processors() -> int:
    """The number of processors that this process may use, which can be fewer than there are.

    A container's quota of processor time counts, too: one of 1.5 as 2, one of 1.2 as 1. More
    threads would be stopped together, for a part of each period.
    """
    if not hasattr(os, "sched_getaffinity"):  # Linux only
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    quota = min(_quotas(), default=math.inf)
    return allowed if quota >= allowed else max(1, math.floor(quota + 0.5))


def usable_threads(wanted: int | None) -> int:
    """So many threads as are wanted, or the default, for an engine whose threads wait by spinning.

    More than there are processors would stop one another: with twice as many, a step takes twice as
    long.
    """
    most = usable_processors()
    return min(wanted or most, most)


def _quotas() -> Iterator[float]:
    """What control groups of both versions allow, in processors."""
    with suppress(OSError, ValueError):
        for line in _MINE.read_text("utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = _GROUPS / "cpu" if controllers else _GROUPS
            folder = top / place.lstrip("/")
            # Up to the top, which is all that a container may see.
            for group in (folder, *folder.parents):
                if group.is_relative_to(top):
                    yield from _quota_of(group)


def _quota_of(group: Path) -> Iterator[float]:
    """What one control group allows, if it limits the time of processors at all."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # without a limit: "max", or -1
            time, period = " ".join((group / name).read_text("utf-8") for name in names).split()
            if int(time) > 0 and int(period) > 0:
                yield int(time) / int(period)


def parallel_jobs(most: int | None = None) -> int:
    """The number of threads for independent jobs.

    One for each processor, but `most`; or as many as `more_jobs` says.
    """
    if _jobs:
        return _jobs[-1]
    return usable_threads(most)


@contextmanager
def more_jobs(count: int) -> Iterator[None]:
    """While other machines do the jobs, so many threads wait for them."""
    _jobs.append(max(count, usable_processors()))
    try:
        yield
    finally:
        _jobs.pop()
