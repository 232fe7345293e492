"""The memory that a process may still take, and what it can give back.

Without the reading of control groups, a self-check in a container would be begun beyond its limit,
and killed instead of skipped (`tests/runtimes/test_memory_available.py`).
"""

import ctypes
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What can be had without swapping; None where the system does not tell (only Linux does).

    A container's limit counts, but not what the kernel would give back: files in its cache.
    """
    system = _fields(_MEMINFO).get("MemAvailable:")
    if system is None:
        return None
    limits = [1024 * system, _left_in_container()]
    return min(limit for limit in limits if limit is not None)


def give_back() -> None:
    """Gives back what was freed, before something large follows: glibc keeps it for later use."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or none
        ctypes.CDLL(None).malloc_trim(0)


def _left_in_container() -> int | None:
    """By control groups, version 2; None where there is no limit."""
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return None
    cached = _fields(_CGROUP / "memory.stat").get("inactive_file", 0)
    return max(0, limit - used + cached)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or `max`
        return None


def _fields(file: Path) -> dict[str, int]:
    """`name number …` lines; nothing where there is no such file."""
    try:
        pairs = (line.split()[:2] for line in file.read_text().splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    except OSError:
        return {}
