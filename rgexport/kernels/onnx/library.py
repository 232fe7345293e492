"""The library of kernels: its path, what it can run on this machine, and how often it ran.

`ctypes` loads the same copy into memory as ONNX Runtime's `register_custom_ops_library`, so its
counters are those of the sessions of this process.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.kernels.native_library import library_path, why_missing

NO_NATIVE = "RGEXPORT_NO_NATIVE"
"""The environment variable that turns the kernels off, with any value but "" and "0"."""
CPU = "RGEXPORT_CPU"
"""The environment variable that limits the instruction set; the library reads it once."""

FOLDER = Path(__file__).parent
LIBRARY = library_path(FOLDER)


@dataclass(frozen=True)
class Kernels:
    """The kernels of this machine.

    Attributes:
        instruction_set: the one in use, of `instruction_sets`; empty if there are no kernels.
        ops: the ops of the domain `ai.rgexport` that have a kernel.
        instruction_sets: those that this processor supports, the least first.
        exact_tokens: up to so many tokens of a step give the bits that each gives alone.
        reason: why there are no kernels; empty if there are some.
    """

    instruction_set: str = ""
    ops: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    exact_tokens: int = 1
    reason: str = ""


_is_turned_off = False
"""Whether the running command turned our kernels off, see `without_kernels`."""


def turned_off() -> bool:
    """Whether the environment or the running command turns our kernels off."""
    return _is_turned_off or os.environ.get(NO_NATIVE, "") not in ("", "0")


@contextmanager
def without_kernels() -> Iterator[None]:
    """Turns our kernels off for sessions that are opened inside."""
    global _is_turned_off
    before, _is_turned_off = _is_turned_off, True
    try:
        yield
    finally:
        _is_turned_off = before


def library() -> Path | None:
    """The shared library to register with ONNX Runtime, if it works here and is not turned off.

    Raises:
        RequestError: RGEXPORT_CPU names no instruction set of this architecture.
    """
    return LIBRARY if isinstance(_usable(), ctypes.CDLL) else None


def kernels() -> Kernels:
    """The kernels and their instruction set, or why there are none.

    Raises:
        RequestError: RGEXPORT_CPU names no instruction set of this architecture.
    """
    loaded = _usable()
    if isinstance(loaded, str):
        return Kernels(reason=loaded)
    here = (level for i, level in _names(loaded.rgexport_level) if loaded.rgexport_level_is_here(i))
    return Kernels(
        instruction_set=loaded.rgexport_instruction_set().decode(),
        ops=tuple(name for _, name in _names(loaded.rgexport_op)),
        instruction_sets=tuple(here),
        exact_tokens=loaded.rgexport_exact_tokens(),
    )


def calls() -> dict[str, int]:
    """How often each op has run in this process; empty if there are no kernels."""
    loaded = _usable()
    if isinstance(loaded, str):
        return {}
    return {name: loaded.rgexport_calls(i) for i, name in _names(loaded.rgexport_op)}


def _usable() -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    if turned_off():
        return f"{NO_NATIVE} turns them off"
    if not LIBRARY.is_file():
        return why_missing(LIBRARY.parent)
    loaded = _load(LIBRARY)
    if isinstance(loaded, ctypes.CDLL):
        _require_known_set(loaded)
    return loaded


@cache
def _load(path: Path) -> ctypes.CDLL | str:
    """The library with the types of its functions, or the reason why it cannot be loaded."""
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.rgexport_instruction_set.restype = ctypes.c_char_p
        for names in (loaded.rgexport_level, loaded.rgexport_op):
            names.argtypes, names.restype = [ctypes.c_size_t], ctypes.c_char_p
        loaded.rgexport_level_is_here.argtypes = [ctypes.c_size_t]
        loaded.rgexport_exact_tokens.restype = ctypes.c_int64
        loaded.rgexport_calls.argtypes = [ctypes.c_size_t]
        loaded.rgexport_calls.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return f"the library cannot be loaded: {error}"
    return loaded


def _require_known_set(loaded: ctypes.CDLL) -> None:
    word = os.environ.get(CPU, "")
    known = [name for _, name in _names(loaded.rgexport_level)]
    if word and word not in known:
        raise RequestError(
            f"{CPU} names no instruction set of this architecture: {word!r}; "
            f"expected one of {', '.join(known)}, or nothing for the best one here"
        )


def _names(function: Callable[[int], bytes | None]) -> Iterator[tuple[int, str]]:
    """The names that a function of an index returns, up to the first null."""
    for index in count():
        name = function(index)
        if name is None:
            return
        yield index, name.decode()
