"""Loads the native libraries, or says why one is missing."""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgexport.kernels.build import NOT_BUILT

Signature = tuple[Any, Sequence[Any]]
"""Result type of a C function (None for `void`), and the types of its arguments."""

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


def load_library(path: Path, signatures: Mapping[str, Signature]) -> ctypes.CDLL | str:
    """Loads a library and declares its functions; returns a reason if it cannot be used.

    Args:
        path: the library.
        signatures: by the function's name after `rgexport_`.
    """
    if not path.is_file():
        return why_missing(path.parent)
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, f"rgexport_{name}")
            function.restype, function.argtypes = result, list(arguments)
    except (OSError, AttributeError) as error:
        return f"the library cannot be loaded: {error}"
    return library
