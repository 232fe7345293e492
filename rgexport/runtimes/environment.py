"""The machine and the software of a measurement."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rgexport._version import __version__
from rgexport.parallelism import usable_processors

_PACKAGES = ("coremltools", "llama_cpp_python", "numpy", "onnxruntime", "torch")
_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""The instructions that decide how fast int4 and int8 are computed, by Linux's names."""


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
