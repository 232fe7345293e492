"""What a rule of `export.mil.shapes` sees of an operation: its operands, and what it may take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from rgexport.export.mil.program import TensorType

BOOL, INT32, STRING = (frozenset({word}) for word in ("bool", "int32", "string"))
FLOATS = frozenset({"float16", "float32"})
INTEGERS = frozenset({"int8", "int16", "int32"})
NUMBERS = FLOATS | INT32
VALUES = NUMBERS | BOOL
SMALL = frozenset({"int8", "uint8", "int16", "uint16"})
ALL = VALUES | SMALL


class Misfit(ValueError):
    """Operands that an operation does not take; the message says what was found and expected."""


@dataclass(frozen=True)
class Operand:
    """A value, as far as it is known before the program runs."""

    type: TensorType
    constant: bool = False
    array: np.ndarray | None = None
    """Content of a constant that stands in the program; None of one that lies in a file."""
    state: bool = False


Operands: TypeAlias = Mapping[str, tuple[Operand, ...]]
"""Input of an operation → what is bound to it; more than one where it takes a list."""


@dataclass(frozen=True)
class Slot:
    """What an input of an operation takes."""

    dtypes: frozenset[str]
    alike: str = ""
    """Operands of the slots with the same word must have the same dtype."""
    optional: bool = False
    constant: bool = False
    many: bool = False
    state: bool = False


Signature: TypeAlias = dict[str, Slot]
SETTING = Slot(INT32, constant=True, optional=True)
"""An axis, axes or a number that has a default."""
FLAG = Slot(BOOL, constant=True, optional=True)
"""True or false, for all or for each axis."""
WORD = Slot(STRING, constant=True, optional=True)


def fit(signature: Signature, operands: Operands) -> None:
    """Checks names, number, kinds and dtypes of operands.

    Raises:
        Misfit: they are not what the signature takes.
    """
    for name in operands:
        if name not in signature:
            raise Misfit(f"there is no input {name!r}; expected {', '.join(signature)}")
    alike: dict[str, tuple[str, str]] = {}
    for name, slot in signature.items():
        bound = operands.get(name, ())
        if not bound and slot.optional:
            continue
        if not bound or len(bound) > 1 and not slot.many:
            raise Misfit(f"its input {name} has {len(bound)} values; expected one")
        for operand in bound:
            _fit_one(name, slot, operand)
            first = alike.setdefault(slot.alike or f"\0{name}", (name, operand.type.dtype))
            if operand.type.dtype != first[1] and slot.alike:
                raise Misfit(
                    f"its input {name} is {operand.type.dtype}, but {first[0]} is {first[1]}"
                )


def _fit_one(name: str, slot: Slot, operand: Operand) -> None:
    if operand.state != slot.state:
        found, expected = ("a state", "a value") if operand.state else ("a value", "a state")
        raise Misfit(f"its input {name} is {found}; expected {expected}")
    if operand.type.dtype not in slot.dtypes:
        expected = " or ".join(sorted(slot.dtypes))
        raise Misfit(f"its input {name} is {operand.type.dtype}; expected {expected}")
    if slot.constant and not operand.constant:
        raise Misfit(f"its input {name} is computed; expected a constant")


@dataclass(frozen=True)
class Arguments:
    """Operands that fit a signature, by name."""

    operands: Operands

    def has(self, name: str) -> bool:
        """Whether the input was given."""
        return bool(self.operands.get(name))

    def types(self, name: str) -> tuple[TensorType, ...]:
        """Types of all that is bound to an input."""
        return tuple(operand.type for operand in self.operands.get(name, ()))

    def type(self, name: str) -> TensorType:
        """Type of the one value that is bound to an input."""
        return self.operands[name][0].type

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self.type(name).shape

    def constant(self, name: str) -> bool:
        """Whether it is a constant."""
        return self.operands[name][0].constant

    def known(self, name: str) -> bool:
        """Whether its content stands in the program (or it was not given)."""
        return not self.has(name) or self.operands[name][0].array is not None

    def array(self, name: str) -> np.ndarray:
        """Its content.

        Raises:
            Misfit: it is not known.
        """
        array = self.operands[name][0].array
        if array is None:
            raise Misfit(f"its input {name} does not stand in the program; expected a small value")
        return array

    def integers(self, name: str) -> tuple[int, ...]:
        """Content of a list of integers or truth values.

        Raises:
            Misfit: it is not known, or no list.
        """
        array = self.array(name)
        if array.ndim != 1:
            raise Misfit(f"its input {name} has the shape {list(array.shape)}; expected a list")
        return tuple(int(item) for item in array)

    def integer(self, name: str, default: int) -> int:
        """Content of an integer.

        Raises:
            Misfit: it is not known, or no single number.
        """
        if not self.has(name):
            return default
        array = self.array(name)
        if array.size != 1:
            raise Misfit(f"its input {name} has the shape {list(array.shape)}; expected one number")
        return int(array.reshape(-1)[0])

    def word(self, name: str, default: str) -> str:
        """Content of a text.

        Raises:
            Misfit: it is not known, or no single text.
        """
        if not self.has(name):
            return default
        array = self.array(name)
        if array.size != 1:
            raise Misfit(f"its input {name} holds {array.size} texts; expected one")
        return str(array.reshape(-1)[0])

    def axis(self, name: str, default: int, rank: int) -> int:
        """An axis of a value with `rank` axes, counted from the front.

        Raises:
            Misfit: there is no such axis.
        """
        return checked_axis(name, self.integer(name, default), rank)

    def axes(self, name: str, rank: int) -> tuple[int, ...]:
        """Several axes, each once.

        Raises:
            Misfit: there is no such axis, or one is named twice.
        """
        asked = self.integers(name)
        axes = tuple(checked_axis(name, axis, rank) for axis in asked)
        if len(set(axes)) != len(axes):
            raise Misfit(f"its input {name} is {list(asked)}; expected each axis once")
        return axes


def checked_axis(name: str, axis: int, rank: int) -> int:
    """`axis` from the front.

    Raises:
        Misfit: a value with `rank` axes has no such axis.
    """
    if not -rank <= axis < rank:
        raise Misfit(f"its input {name} is {axis}, but there are {rank} axes")
    return axis % rank


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that all of `shapes` are stretched to.

    Raises:
        Misfit: they do not fit each other.
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        wide = {size for size in sizes if size != 1}
        if len(wide) > 1:
            shown = " and ".join(str(list(shape)) for shape in shapes)
            raise Misfit(f"its inputs have the shapes {shown}, which do not fit each other")
        result.append(wide.pop() if wide else 1)
    return tuple(result)
