"""What an operation is given, as far as that is known before the program runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rgexport.export.mil.program import TensorType


class Misfit(ValueError):
    """Operands that an operation does not take; the message says why."""


@dataclass(frozen=True)
class Operand:
    """A value that is bound to an input of an operation."""

    type: TensorType
    constant: bool = False
    state: bool = False
    known: tuple[Any, ...] | None = None
    """The elements of a small constant that stands in the program."""


Operands: TypeAlias = Mapping[str, tuple[Operand, ...]]
"""Input of an operation → what is bound to it; more than one where it takes a list."""
