"""The files of native libraries, and why one is missing."""

import sys
from pathlib import Path

from rgexport.kernels.build import NOT_BUILT

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def library_path(project: Path) -> Path:
    """Returns the path of a project's library, such as `kernels/onnx/librgexport_onnx.so`."""
    return project / f"librgexport_{project.name}{_SUFFIX}"


def why_missing(project: Path) -> str:
    """Returns why a project has no library, and what to do about it."""
    reason = project / NOT_BUILT
    if reason.is_file():
        return f"it could not be built when rgexport was installed; {reason} says why"
    return "it is not built; run `python -m rgexport.kernels.build`"
