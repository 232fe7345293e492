"""Where a measurement was made."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rgexport import __version__

_PACKAGES = ("numpy", "onnxruntime", "torch")


def environment() -> dict[str, str | int]:
    """CPU, cores that this process may use, system, and versions of what computes."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    facts: dict[str, str | int] = {
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "system": platform.platform(),
        "python": platform.python_version(),
        "rgexport": __version__,
    }
    return facts | {name: found for name in _PACKAGES if (found := _version(name))}


def _cpu() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
