"""Turns a function into a list of calls on numbered slots, once, when a program is opened."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rgexport.export.mil.package import Package
from rgexport.export.mil.program import (
    BITS,
    UNKNOWN,
    Constant,
    FileValue,
    Function,
    Name,
    Operation,
    TensorType,
    Value,
    numpy_type,
)
from rgexport.runtimes.coreml.interpreter.operations import OPS, OperationInputs
from rgexport.runtimes.coreml.interpreter.weights import (
    FileWeight,
    Unsupported,
    WeightCache,
    compressed_weight,
    file_weight,
    whole_constant,
)

SMALL_BYTES = 64 << 10
"""Constants in files up to this size are read when the program is opened."""

_FLOATS = ("float16", "float32")
_UNCONVERTED = {"float32", "bool"}
"""Dtypes that arithmetic takes and gives as they are; float16 is computed in float32."""

Converter = Callable[[Any], Any] | None
"""Converts the value in a slot to an argument; None: no conversion."""


class Slots:
    """Numbered slots for inputs, states, constants and results, in the order of definition."""

    def __init__(self, package: Package, cache: WeightCache):
        self.values: list[Any] = []
        """The value of each slot when a run starts; None before it is computed."""
        self.types: list[TensorType] = []
        self.names: dict[str, int] = {}
        """The slot of each value that has a name."""
        self._package, self._cache = package, cache
        self._wide: dict[int, int] = {}

    def define(self, name: str, type: TensorType, value: Any = None) -> int:
        """Adds a slot for a value.

        Raises:
            Unsupported: the name is taken.
        """
        if name in self.names:
            raise Unsupported(f"{name} is computed twice")
        self.names[name] = self._new(type, value)
        return self.names[name]

    def operand(self, value: Value) -> int:
        """Returns the slot of an operation's input.

        Raises:
            Unsupported: it is not defined.
        """
        if not isinstance(value, Name):
            return self._new(value.type, self.load(value))
        if value.name not in self.names:
            raise Unsupported(f"nothing computes {value.name} before it")
        return self.names[value.name]

    def load(self, value: Constant) -> np.ndarray | FileWeight:
        """Returns a constant as an array, or a large one of floats as a weight to be read later."""
        kind = value.type
        is_large = kind.dtype in _FLOATS and kind.shape and kind.nbytes > SMALL_BYTES
        if isinstance(value, FileValue) and is_large:
            return file_weight(self._package, value, self._cache)
        return whole_constant(self._package, value)

    def widened(self, slot: int) -> int:
        """Returns the slot of the same values in float32, where `slot` has a float16 constant."""
        value, type = self.values[slot], self.types[slot]
        if type.dtype != "float16" or not isinstance(value, np.ndarray):
            return slot
        if slot not in self._wide:
            wide = TensorType("float32", type.shape)
            self._wide[slot] = self._new(wide, value.astype(np.float32))
        return self._wide[slot]

    def constants(self, operands: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        singles = {name: slots[0] for name, slots in operands.items() if len(slots) == 1}
        values = {name: self.values[slot] for name, slot in singles.items()}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def _new(self, type: TensorType, value: Any) -> int:
        self.values.append(value)
        self.types.append(type)
        return len(self.values) - 1


class Step(NamedTuple):
    """A call: slots of its arguments and its result, and slots that no later step reads."""

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    result: int
    shape: tuple[int, ...]
    dtype: np.dtype
    dead: tuple[int, ...]
    operation: Operation


class Translator:
    def __init__(self, package: Package, function: Function, cache: WeightCache):
        self.slots = Slots(package, cache)
        self._steps: list[Step] = []
        self._package, self._states, self._cache = package, function.states, cache
        for name, type in (function.inputs | function.states).items():
            self.slots.define(name, type)

    def add(self, operation: Operation) -> None:
        """Translates one operation.

        Raises:
            Unsupported: it cannot be executed.
            RequestError: a blob that does not agree with the program.
        """
        if operation.blocks:
            raise Unsupported("it has blocks of its own")
        if operation.type == "write_state":
            self._write_state(operation)
            return
        if len(operation.outputs) != 1:
            raise Unsupported(f"it has {len(operation.outputs)} outputs; expected 1")
        ((name, type),) = operation.outputs
        if operation.type == "const":
            if "val" not in operation.attributes:
                raise Unsupported("it has no value")
            self.slots.define(name, type, self.slots.load(operation.attributes["val"]))
        elif operation.type.startswith("constexpr_"):
            weight = compressed_weight(self._package, operation, self._cache)
            self.slots.define(name, type, weight)
        elif operation.type == "read_state":
            state = self.slots.names[self._state(operation)]
            self._add_step(operation, _same, [state], self.slots.define(name, type))
        else:
            self._compute(operation, name, type)

    def finished(self, outputs: Sequence[str]) -> list[Step]:
        """Returns the steps, each with the slots that no later step reads.

        Constants, states and outputs outlive all steps.
        """
        alive = {slot for slot, value in enumerate(self.slots.values) if value is not None}
        alive.update(self.slots.names[name] for name in (*self._states, *outputs))
        done = []
        for step in reversed(self._steps):
            dead = {*step.arguments, step.result} - alive
            alive |= dead
            done.append(step._replace(dead=tuple(dead)))
        return done[::-1]

    def _write_state(self, operation: Operation) -> None:
        """Puts another array in the state's place: the old one is not changed."""
        state = self.slots.names[self._state(operation)]
        data = operation.inputs.get("data", ())
        if len(data) != 1:
            raise Unsupported("it has no data")
        slot = self.slots.operand(data[0])
        function = _converted(_same, [self._converter(slot, arithmetic=False)], None)
        self._add_step(operation, function, [slot], state)

    def _compute(self, operation: Operation, name: str, type: TensorType) -> None:
        op = OPS.get(operation.type)
        if op is None:
            raise Unsupported("it is no operation that this interpreter knows")
        operands = {
            parameter: tuple(map(self.slots.operand, values))
            for parameter, values in operation.inputs.items()
        }
        types = {n: tuple(self.slots.types[s] for s in slots) for n, slots in operands.items()}
        inputs = OperationInputs(self.slots.constants(operands), types)
        call = op.make(inputs)
        if unknown := operands.keys() - inputs.names_read:
            raise Unsupported(f"it has the input {min(unknown)}, which is not known here")
        slots = [slot for name in call.operands for slot in operands[name]]
        result = self._rounding(type, slots) if op.arithmetic else None
        if op.arithmetic:
            slots = [self.slots.widened(slot) for slot in slots]
        lazy = {slot for name in call.lazy for slot in operands[name]}
        converters = [
            None if slot in lazy else self._converter(slot, op.arithmetic) for slot in slots
        ]
        function = _converted(call.function, converters, result)
        self._add_step(operation, function, slots, self.slots.define(name, type))

    def _rounding(self, type: TensorType, slots: Sequence[int]) -> np.dtype | None:
        """Returns the dtype that a result of arithmetic is cast to; None if it has that already."""
        dtypes = {self.slots.types[slot].dtype for slot in slots}
        if type.dtype not in {"bool", *dtypes}:
            raise Unsupported(f"it gives {type.dtype} of {', '.join(sorted(dtypes))}")
        return None if {type.dtype, *dtypes} <= _UNCONVERTED else numpy_type(type.dtype)

    def _converter(self, slot: int, arithmetic: bool) -> Converter:
        if isinstance(self.slots.values[slot], FileWeight):
            return FileWeight.wide if arithmetic else FileWeight.whole
        return _widen if arithmetic and self.slots.types[slot].dtype == "float16" else None

    def _state(self, operation: Operation) -> str:
        values = operation.inputs.get("input", ())
        name = values[0].name if len(values) == 1 and isinstance(values[0], Name) else ""
        if name not in self._states:
            raise Unsupported(f"{name or 'its input'} is no state of the function")
        return name

    def _add_step(
        self,
        operation: Operation,
        function: Callable[..., Any],
        arguments: Sequence[int],
        result: int,
    ) -> None:
        type = self.slots.types[result]
        if type.dtype not in BITS or UNKNOWN in type.shape:
            raise Unsupported(f"it gives {type}; expected numbers, as many as are known before")
        dtype = numpy_type(type.dtype)
        step = Step(function, tuple(arguments), result, type.shape, dtype, (), operation)
        self._steps.append(step)


def _converted(
    function: Callable[..., Any], converters: Sequence[Converter], result: np.dtype | None
) -> Callable[..., Any]:
    """Returns `function` of converted arguments, its result cast to `result` if that is given."""
    if result is None and not any(converters):
        return function
    changes = [(index, change) for index, change in enumerate(converters) if change]

    def call(*arguments: Any) -> Any:
        converted = list(arguments)
        for index, change in changes:
            converted[index] = change(converted[index])
        value = function(*converted)
        return value if result is None else np.asarray(value).astype(result, copy=False)

    return call


def _same(array: Any) -> Any:
    return array


def _widen(array: Any) -> Any:
    return array.astype(np.float32)
