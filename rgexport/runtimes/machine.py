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
_PACKAGES = ("coremltools", "llama_cpp_python", "numpy", "onnxruntime", "torch")
_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""The instructions that decide how fast int4 and int8 are computed, by Linux's names."""


def rss_bytes() -> int | None:
    """Returns the memory of this process; None where it is unknown (not on Linux)."""
    try:
        pages = int(_STATM.read_text("utf-8").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int | None:
    """Returns the most memory that this process has held; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF))


def peak_bytes(usage: "struct_rusage") -> int:
    """Returns the peak of a process in bytes; its unit depends on the system."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int | None:
    """Returns the memory that is left, in a container too; None if unknown (not Linux)."""
    system = _fields(_MEMINFO).get("MemAvailable:")
    if system is None:
        return None
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:  # in no container
        return 1024 * system
    cached = _fields(_CGROUP / "memory.stat").get("inactive_file", 0)
    return min(1024 * system, max(0, limit - used + cached))


def release_freed_memory() -> None:
    """Returns freed memory to the system, which glibc would keep for later use."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or none
        ctypes.CDLL(None).malloc_trim(0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text("utf-8"))
    except (OSError, ValueError):  # no such file, or `max`
        return None


def _fields(file: Path) -> dict[str, int]:
    try:
        pairs = (line.split()[:2] for line in file.read_text("utf-8").splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    except OSError:
        return {}


def environment() -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "cpu": cpu(),
        "cores": usable_processors(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "rgexport": __version__,
    }
    return facts | {name: version for name in _PACKAGES if (version := _version(name))}


def cpu() -> str:
    facts = {}
    if _CPUINFO.is_file():
        first = _CPUINFO.read_text("utf-8", "replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name") or platform.processor() or platform.machine()
    features = ", ".join(feature for feature in _FEATURES if feature in flags)
    return f"{name} ({features})" if features else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_device(device: str = "auto") -> str:
    """Returns a device that torch can use; `auto` is CUDA if there is one."""
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
