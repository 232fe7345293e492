"""How an operation of the table becomes a function of arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rgexport.export.mil.program import Operation, TensorType
from rgexport.runtimes.coreml.interpreter.weights import Unsupported

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Call:
    """A function and the parameters whose arrays it takes, in this order.

    A parameter with several values, such as `values`, gives as many arguments. A parameter in
    `lazy` may come as a `Weight` instead of an array.
    """

    function: Callable[..., Any]
    """Returns the array of the one output, or a sequence of as many as there are."""
    operands: tuple[str, ...]
    lazy: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Given:
    """What an operation was given when the program was opened.

    Every parameter must be asked for, as an operand or by value: one that nobody asks for may
    mean something that this interpreter does not do.
    """

    operation: Operation
    constants: Mapping[str, np.ndarray]
    """Parameter → its value, where that is known."""
    types: Mapping[str, tuple[TensorType, ...]]
    """Parameter → the types of its values."""
    asked: set[str] = field(default_factory=set)

    def call(
        self, function: Callable[..., Any], *operands: str, lazy: tuple[str, ...] = ()
    ) -> Call:
        """A call with operands that must be there.

        Raises:
            Unsupported: one is missing.
        """
        for name in operands:
            if not self.types.get(name):
                raise Unsupported(f"it has no input {name}")
        self.asked.update(operands)
        return Call(function, operands, lazy)

    def has(self, name: str) -> bool:
        """Whether a parameter was given."""
        return bool(self.types.get(name))

    def value(self, name: str, default: Any = _REQUIRED) -> Any:
        """The array of a parameter that must be known when the program is opened.

        Raises:
            Unsupported: it is not, or it is not there and has no default.
        """
        self.asked.add(name)
        if name in self.constants:
            return self.constants[name]
        if self.has(name):
            raise Unsupported(f"its input {name} is computed; expected a constant")
        if default is _REQUIRED:
            raise Unsupported(f"it has no input {name}")
        return default

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number, of a constant with one element."""
        return int(self._item(name, default))

    def integers(self, name: str, default: Any = _REQUIRED) -> Any:
        """A tuple of whole numbers, or the default."""
        value = self.value(name, default)
        return tuple(value.reshape(-1).tolist()) if isinstance(value, np.ndarray) else value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self._item(name, default))

    def number(self, name: str, default: Any = _REQUIRED) -> np.float32:
        """A number, in float32."""
        return np.float32(self._item(name, default))

    def word(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        return str(self._item(name, default))

    def rank(self, name: str) -> int:
        """The rank of a parameter's first value."""
        types = self.types.get(name)
        if not types:
            raise Unsupported(f"it has no input {name}")
        return len(types[0].shape)

    def _item(self, name: str, default: Any) -> Any:
        value = self.value(name, default)
        if not isinstance(value, np.ndarray):
            return value
        if value.size != 1:
            raise Unsupported(f"its input {name} has {value.size} elements; expected 1")
        return value.item()


Make = Callable[[Given], Call]


@dataclass(frozen=True)
class Op:
    """A row of the table.

    `arithmetic`: float16 operands come widened to float32 and the result is rounded to its
    declared dtype. Others only move elements, and see arrays as they are.
    """

    make: Make
    arithmetic: bool
