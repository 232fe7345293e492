"""The library of ONNX Runtime kernels: its path, its ops on this machine, and their call counts.

`ctypes` loads the copy that ONNX Runtime has, so the counters are those of its sessions.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.kernels.build import Signature, library_path, load_library, why_missing

NO_NATIVE = "RGEXPORT_NO_NATIVE"
"""The environment variable that turns the kernels off, with any value but "" and "0"."""
CPU = "RGEXPORT_CPU"
"""The environment variable that limits the instruction set; the library reads it once."""

FOLDER = Path(__file__).parent
LIBRARY = library_path(FOLDER)


@dataclass(frozen=True)
class Kernels:
    """The kernels of this machine, or the `reason` why there are none.

    `ops` of the domain `ai.rgexport` have a kernel. `instruction_sets` are supported by this
    processor, from the least to the best. Up to `exact_tokens` tokens of a step give the bits of
    each alone.
    """

    instruction_set: str = ""
    ops: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    exact_tokens: int = 1
    reason: str = ""


_is_turned_off = False


def turned_off() -> bool:
    return _is_turned_off or os.environ.get(NO_NATIVE, "") not in ("", "0")


@contextmanager
def without_kernels() -> Iterator[None]:
    global _is_turned_off
    before, _is_turned_off = _is_turned_off, True
    try:
        yield
    finally:
        _is_turned_off = before


def library() -> Path | None:
    """Returns the library for ONNX Runtime, if it works here and is not turned off.

    Raises RequestError where RGEXPORT_CPU names no instruction set of this architecture.
    """
    return LIBRARY if isinstance(_usable(), ctypes.CDLL) else None


def kernels() -> Kernels:
    """Returns the kernels, or why there are none; raises as `library` does."""
    loaded = _usable()
    if isinstance(loaded, str):
        return Kernels(reason=loaded)
    levels = enumerate(_names(loaded.rgexport_level))
    return Kernels(
        instruction_set=loaded.rgexport_instruction_set().decode(),
        ops=_names(loaded.rgexport_op),
        instruction_sets=tuple(name for i, name in levels if loaded.rgexport_level_is_here(i)),
        exact_tokens=loaded.rgexport_exact_tokens(),
    )


def calls() -> dict[str, int]:
    """Returns how often each op has run in this process; empty if there are no kernels."""
    loaded = _usable()
    if isinstance(loaded, str):
        return {}
    return {name: loaded.rgexport_calls(i) for i, name in enumerate(_names(loaded.rgexport_op))}


def _usable() -> ctypes.CDLL | str:
    if turned_off():
        return f"{NO_NATIVE} turns them off"
    if not LIBRARY.is_file():  # it may be built while this process runs
        return why_missing(LIBRARY.parent)
    loaded, name = _load(LIBRARY), os.environ.get(CPU, "")
    known = () if isinstance(loaded, str) else _names(loaded.rgexport_level)
    if name and known and name not in known:
        raise RequestError(
            f"{CPU} names no instruction set of this architecture: {name!r}; "
            f"expected one of {', '.join(known)}, or nothing for the best one here"
        )
    return loaded


_SIGNATURES: dict[str, Signature] = {
    "instruction_set": (ctypes.c_char_p, ()),
    "level": (ctypes.c_char_p, (ctypes.c_size_t,)),
    "level_is_here": (ctypes.c_int, (ctypes.c_size_t,)),
    "op": (ctypes.c_char_p, (ctypes.c_size_t,)),
    "exact_tokens": (ctypes.c_int64, ()),
    "calls": (ctypes.c_int64, (ctypes.c_size_t,)),
}


@cache
def _load(path: Path) -> ctypes.CDLL | str:
    return load_library(path, _SIGNATURES)


def _names(function: Callable[[int], bytes | None]) -> tuple[str, ...]:
    return tuple(name.decode() for name in takewhile(bool, map(function, count())) if name)
