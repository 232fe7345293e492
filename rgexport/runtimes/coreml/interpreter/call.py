"""How an operation of the table becomes a function of arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgexport.export.mil.program import TensorType
from rgexport.runtimes.coreml.interpreter.weights import Unsupported


@dataclass(frozen=True)
class Call:
    """A function and the parameters whose arrays it takes, in this order.

    A parameter with several values, such as `values`, gives as many arguments. A parameter in
    `lazy` may come as a `Weight` instead of an array.
    """

    function: Callable[..., Any]
    """Returns the array of the only output, or a sequence of arrays."""
    operands: tuple[str, ...]
    lazy: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Given:
    """The inputs of an operation, as far as they are known when a program is opened.

    Every parameter must be asked for, as an operand or by value: one that is not asked for may
    mean something that this interpreter does not do.
    """

    constants: Mapping[str, np.ndarray]
    """Parameter → its value, where that is known."""
    types: Mapping[str, tuple[TensorType, ...]]
    """Parameter → the types of its values."""
    asked: set[str] = field(default_factory=set)

    def call(
        self, function: Callable[..., Any], *operands: str, lazy: tuple[str, ...] = ()
    ) -> Call:
        """A call with operands that must be given.

        Raises:
            Unsupported: one is missing.
        """
        for name in operands:
            self._require(name)
        self.asked.update(operands)
        return Call(function, operands, lazy)

    def has(self, name: str) -> bool:
        """Whether a parameter was given."""
        return bool(self.types.get(name))

    def integers(self, name: str) -> tuple[int, ...]:
        """A constant of integers.

        Raises:
            Unsupported: it is missing or computed.
        """
        return tuple(self._constant(name).reshape(-1).tolist())

    def item(self, name: str) -> Any:
        """A constant of one element as a Python scalar; raises as `integers`."""
        value = self._constant(name)
        if value.size != 1:
            raise Unsupported(f"its input {name} has {value.size} elements; expected 1")
        return value.item()

    def _constant(self, name: str) -> np.ndarray:
        self._require(name)
        self.asked.add(name)
        if name not in self.constants:
            raise Unsupported(f"its input {name} is computed; expected a constant")
        return self.constants[name]

    def _require(self, name: str) -> None:
        if not self.has(name):
            raise Unsupported(f"it has no input {name}")


Make = Callable[[Given], Call]


@dataclass(frozen=True)
class Op:
    """A row of the table.

    `arithmetic`: float16 operands come widened to float32, and the result is rounded to its
    declared dtype. Other operations only move elements, and see arrays as they are.
    """

    make: Make
    arithmetic: bool
