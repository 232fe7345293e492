"""Numbered places for all values of a function, and what they hold before it runs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rgexport.export.mil.package import Package
from rgexport.export.mil.program import Constant, FileValue, Name, TensorType, Value
from rgexport.runtimes.coreml.interpreter.weights import (
    Unsupported,
    Weight,
    WeightCache,
    file_weight,
    whole_constant,
)

SMALL_BYTES = 64 << 10
"""Constants in files up to this size are read when the program is opened, and kept."""

_FLOATS = ("float16", "float32")


class Slots:
    """Inputs, states, constants and results, in the order in which they are defined."""

    def __init__(self, package: Package, cache: WeightCache):
        self.values: list[Any] = []
        """What each slot holds when a run starts; None: nothing yet."""
        self.types: list[TensorType] = []
        self.names: dict[str, int] = {}
        """The slot of each value that has a name."""
        self._package, self._cache = package, cache
        self._wide: dict[int, int] = {}

    def define(self, name: str, type: TensorType, value: Any = None) -> int:
        """A new slot for a value.

        Raises:
            Unsupported: the name is taken.
        """
        if name in self.names:
            raise Unsupported(f"{name} is computed twice")
        self.names[name] = self._new(type, value)
        return self.names[name]

    def operand(self, value: Value) -> int:
        """The slot of a value that an operation is given.

        Raises:
            Unsupported: it is not defined.
        """
        if not isinstance(value, Name):
            return self._new(value.type, self.load(value))
        if value.name not in self.names:
            raise Unsupported(f"nothing computes {value.name} before it")
        return self.names[value.name]

    def load(self, value: Constant) -> np.ndarray | Weight:
        """A constant: at hand if it is small, else a weight to be read later."""
        if isinstance(value, FileValue) and value.type.dtype in _FLOATS and value.type.shape:
            if value.type.nbytes > SMALL_BYTES:
                return file_weight(self._package, value, self._cache)
        return whole_constant(self._package, value)

    def widened(self, slot: int) -> int:
        """The slot of a float16 constant's values in float32, or `slot` if it is something else."""
        value, type = self.values[slot], self.types[slot]
        if type.dtype != "float16" or not isinstance(value, np.ndarray):
            return slot
        if slot not in self._wide:
            wide = TensorType("float32", type.shape)
            self._wide[slot] = self._new(wide, value.astype(np.float32))
        return self._wide[slot]

    def constants(self, operands: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Those of an operation's parameters that have one value, known as an array."""
        singles = {name: slots[0] for name, slots in operands.items() if len(slots) == 1}
        found = {name: self.values[slot] for name, slot in singles.items()}
        return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}

    def _new(self, type: TensorType, value: Any) -> int:
        self.values.append(value)
        self.types.append(type)
        return len(self.values) - 1
