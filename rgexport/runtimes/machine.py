"""Facts about this process and its machine: memory, processor, software, torch's device."""

import ctypes
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rgexport._version import __version__
from rgexport.errors import NotInstalled, RequestError
from rgexport.parallelism import usable_processors

if TYPE_CHECKING:
    from resource import struct_rusage

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("coremltools", "llama_cpp_python", "numpy", "onnxruntime", "torch")
"""The packages that decide the results of a run; reports show their versions."""
_FEATURES = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""The instructions that decide how fast int4 and int8 are computed, by Linux's names."""


def rss_bytes() -> int | None:
    """Returns the memory of this process; None where it is unknown (not on Linux)."""
    try:
        resident_pages = _STATM.read_text("utf-8").split()[1]
    except OSError:
        return None
    return int(resident_pages) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int | None:
    """Returns the most memory that this process has held; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF))


def peak_bytes(usage: "struct_rusage") -> int:
    """Returns the peak of a process in bytes; `ru_maxrss` is in KiB except on macOS."""
    if sys.platform == "darwin":
        return usage.ru_maxrss
    return usage.ru_maxrss * 1024


def available_bytes() -> int | None:
    """Returns the memory that is free, in a container too; None if unknown (not Linux)."""
    system_kib = _fields(_MEMINFO).get("MemAvailable:")
    if system_kib is None:
        return None
    system_bytes = 1024 * system_kib
    limit = _number(_CGROUP / "memory.max")
    used = _number(_CGROUP / "memory.current")
    if limit is None or used is None:  # in no container
        return system_bytes
    # The kernel counts a container's file cache as used, and frees it when memory is short.
    cached = _fields(_CGROUP / "memory.stat").get("inactive_file", 0)
    container_bytes = max(0, limit - used + cached)
    return min(system_bytes, container_bytes)


def release_freed_memory() -> None:
    """Returns freed memory to the system, which glibc would keep for later use."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or none
        ctypes.CDLL(None).malloc_trim(0)


def _number(file: Path) -> int | None:
    """Returns the number in a file of the cgroup; None if there is no file or no limit."""
    try:
        return int(file.read_text("utf-8"))
    except (OSError, ValueError):  # no such file, or `max`
        return None


def _fields(file: Path) -> dict[str, int]:
    """Returns the numbers by name in a file of lines `name number`; empty if it cannot be read."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        return {}
    numbers = {}
    for line in lines:
        fields = line.split()[:2]
        if len(fields) == 2 and fields[1].isdigit():
            numbers[fields[0]] = int(fields[1])
    return numbers


def environment() -> dict[str, str | int]:
    """Returns the processor, the system and the versions that a report names."""
    facts: dict[str, str | int] = {
        "cpu": cpu(),
        "cores": usable_processors(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "rgexport": __version__,
    }
    for package in _PACKAGES:
        installed = _version(package)
        if installed:
            facts[package] = installed
    return facts


def cpu() -> str:
    """Returns the processor's name and, in brackets, its instructions among `_FEATURES`."""
    facts = _first_processor()
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", facts.get("Features", "")).split()
    features = ", ".join(feature for feature in _FEATURES if feature in flags)
    if not features:
        return name
    return f"{name} ({features})"


def _first_processor() -> dict[str, str]:
    """Returns the fields of the first processor in /proc/cpuinfo; none except on Linux."""
    if not _CPUINFO.is_file():
        return {}
    text = _CPUINFO.read_text("utf-8", "replace")
    facts = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_device(device: str = "auto") -> str:
    """Returns a device that torch can use; `auto` is CUDA if there is one.

    Raises:
        NotInstalled: torch is missing.
        RequestError: torch cannot use the device.
    """
    try:
        import torch
    except ImportError:
        raise NotInstalled(
            "this needs torch for the reference model: pip install 'rgexport[export]'"
        ) from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(f"torch cannot use the device {device!r}: {reason}") from None
    return device
