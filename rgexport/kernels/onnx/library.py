"""The library of kernels: where it is, what it can do here, how often it ran.

It is loaded with `ctypes`, which gives the same copy in memory as ONNX Runtime's
`register_custom_ops_library` does: so its counters are those of the sessions of this process.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

from rgexport.errors import RequestError

NO_NATIVE = "RGEXPORT_NO_NATIVE"
"""The environment variable that turns the kernels off: with any value but "" and "0"."""
CPU = "RGEXPORT_CPU"
"""The environment variable that names the best instruction set that may be used; read once."""

FOLDER = Path(__file__).parent
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY = FOLDER / f"librgexport_onnx{_SUFFIX}"
NOT_BUILT = FOLDER / "not-built.txt"
"""Why the installation has no library, if it has none."""


@dataclass(frozen=True)
class Kernels:
    """What runs on this machine.

    Attributes:
        instruction_set: whose kernels run: one of `instruction_sets`; empty where none do.
        ops: the ops of the domain `ai.rgexport` that have a kernel.
        instruction_sets: those that this processor has, from the least to the most.
        reason: why there are no kernels; empty where there are some.
    """

    instruction_set: str = ""
    ops: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    reason: str = ""


def turned_off() -> bool:
    """Whether the environment says that no kernel of ours may run."""
    return os.environ.get(NO_NATIVE, "") not in ("", "0")


def library() -> Path | None:
    """The shared library to register with ONNX Runtime, if it works here and is not turned off.

    Raises:
        RequestError: RGEXPORT_CPU is no word for an instruction set of this architecture.
    """
    return LIBRARY if isinstance(_usable(), ctypes.CDLL) else None


def kernels() -> Kernels:
    """Which kernels there are, and on which instruction set they run; or why there are none.

    Raises:
        RequestError: RGEXPORT_CPU is no word for an instruction set of this architecture.
    """
    loaded = _usable()
    if isinstance(loaded, str):
        return Kernels(reason=loaded)
    here = (level for i, level in _levels(loaded) if loaded.rgexport_level_is_here(i))
    return Kernels(
        instruction_set=loaded.rgexport_instruction_set().decode(),
        ops=tuple(name for _, name in _ops(loaded)),
        instruction_sets=tuple(here),
    )


def calls() -> dict[str, int]:
    """How often each op has run in this process; empty where there are no kernels."""
    loaded = _usable()
    if isinstance(loaded, str):
        return {}
    return {name: loaded.rgexport_calls(i) for i, name in _ops(loaded)}


def _usable() -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    if turned_off():
        return f"{NO_NATIVE} turns them off"
    if not LIBRARY.is_file():
        if NOT_BUILT.is_file():
            return f"they could not be built when rgexport was installed; {NOT_BUILT} says why"
        return "they are not built; run `python -m rgexport.kernels.onnx.build`"
    loaded = _load(LIBRARY)
    if isinstance(loaded, ctypes.CDLL):
        _require_known_word(loaded)
    return loaded


@cache
def _load(path: Path) -> ctypes.CDLL | str:
    """The loaded library, with the types of its functions; or what the system says of it."""
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.rgexport_instruction_set.restype = ctypes.c_char_p
        for names in (loaded.rgexport_level, loaded.rgexport_op):
            names.argtypes, names.restype = [ctypes.c_size_t], ctypes.c_char_p
        loaded.rgexport_level_is_here.argtypes = [ctypes.c_size_t]
        loaded.rgexport_calls.argtypes = [ctypes.c_size_t]
        loaded.rgexport_calls.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return f"the library cannot be loaded: {error}"
    return loaded


def _require_known_word(loaded: ctypes.CDLL) -> None:
    word = os.environ.get(CPU, "")
    known = [name for _, name in _levels(loaded)]
    if word and word not in known:
        raise RequestError(
            f"{CPU} names no instruction set of this architecture: {word!r}; "
            f"expected one of {', '.join(known)}, or nothing for the best one here"
        )


def _levels(loaded: ctypes.CDLL) -> Iterator[tuple[int, str]]:
    """All instruction sets of this architecture, from the least to the most."""
    return _names(loaded.rgexport_level)


def _ops(loaded: ctypes.CDLL) -> Iterator[tuple[int, str]]:
    return _names(loaded.rgexport_op)


def _names(function: Callable[[int], bytes | None]) -> Iterator[tuple[int, str]]:
    """What a function of an index says, until it says nothing."""
    for index in count():
        name = function(index)
        if name is None:
            return
        yield index, name.decode()
