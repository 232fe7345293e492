"""One row of the table of targets, and what an execution of it may end in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


class WrongAccept(Exception):
    """A reader accepted what its oracle refuses, or read it otherwise.

    The first argument names the rule, the second one tells of this input.
    """


@dataclass(frozen=True)
class Target:
    """A reader of files, and how it is fuzzed.

    An input is bytes: a file, or several files in the form of `folders`.
    """

    name: str
    seeds: Callable[[Path], Iterable[bytes]]
    """Sound inputs, made in an empty folder."""
    mutate: Callable[[bytes, Random], bytes]
    """Knows the format, so that its changes pass the checks of the outermost form."""
    read: Callable[[bytes, Path], Any]
    """Puts the input into a folder and reads it as the command line does."""
    agree: Callable[[bytes, Path, Any], None]
    """Compares what was read with what an oracle reads; raises `WrongAccept`."""
    max_bytes: int = 1 << 16
    """Of an input."""


def require(condition: object, complaint: str, detail: object = "") -> None:
    """Raises `WrongAccept` where an accepted input breaks a rule."""
    if not condition:
        raise WrongAccept(complaint, detail)


def oracle(read: Callable[[], Any], complaint: str) -> Any:
    """What an oracle makes of an input that was accepted; it must accept it too."""
    try:
        return read()
    except Exception as error:
        raise WrongAccept(complaint, f"{type(error).__name__}: {error}") from None


def covers(stated: Any, read: Any) -> bool:
    """Whether all that was read was stated so; what was left out or is new counts as such."""
    if isinstance(stated, dict) and isinstance(read, dict):
        return all(key not in stated or covers(stated[key], value) for key, value in read.items())
    if isinstance(stated, list) and isinstance(read, list):
        return len(stated) == len(read) and all(map(covers, stated, read))
    return bool(stated == read) and isinstance(stated, bool) == isinstance(read, bool)
