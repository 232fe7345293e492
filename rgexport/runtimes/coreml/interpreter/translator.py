"""Turns a function into a list of calls on numbered slots, once, when a program is opened."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rgexport.export.mil.elements import numpy_type
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import BITS, UNKNOWN, Function, Name, Operation, TensorType
from rgexport.runtimes.coreml.interpreter.call import Call, Given
from rgexport.runtimes.coreml.interpreter.compression import compressed_weight
from rgexport.runtimes.coreml.interpreter.slots import Slots
from rgexport.runtimes.coreml.interpreter.table import OPS
from rgexport.runtimes.coreml.interpreter.weights import Unsupported, Weight, WeightCache

_F32 = np.dtype(np.float32)
_AS_THEY_ARE = {"float32", "bool"}
"""Operands and results of arithmetic that need no conversion."""


class Step(NamedTuple):
    """One call: slots of its arguments and results, and slots that nobody needs afterwards."""

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    types: tuple[tuple[tuple[int, ...] | None, np.dtype], ...]
    """Shape (None if it is not known before) and dtype of each result."""
    dead: tuple[int, ...]
    operation: Operation


class Translator:
    """Goes through the operations of a function in their order."""

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
            RequestError: a blob that is not what the program says.
        """
        if operation.blocks:
            raise Unsupported("it has blocks of its own")
        if special := _SPECIAL.get(operation.type):
            special(self, operation)
        elif operation.type.startswith("constexpr_"):
            weight = compressed_weight(self._package, operation, self._cache)
            self.slots.define(*operation.outputs[0], weight)
        else:
            self._compute(operation)

    def finished(self, outputs: Sequence[str]) -> list[Step]:
        """The steps, each with the slots that it is the last to use.

        Constants, states and outputs outlive all steps.
        """
        alive = {slot for slot, value in enumerate(self.slots.values) if value is not None}
        alive.update(self.slots.names[name] for name in (*self._states, *outputs))
        done = []
        for step in reversed(self._steps):
            dead = {*step.arguments, *step.results} - alive
            alive |= dead
            done.append(step._replace(dead=tuple(dead)))
        return done[::-1]

    def constant(self, operation: Operation) -> None:
        """A `const`."""
        value = operation.attributes.get("val")
        if value is None or len(operation.outputs) != 1:
            raise Unsupported("it has no value, or not one output")
        self.slots.define(*operation.outputs[0], self.slots.load(value))

    def read_state(self, operation: Operation) -> None:
        """The state's array as it is now: nobody changes it in place."""
        slot = self.slots.names[self._state(operation)]
        self._add_step(operation, lambda x: x, (slot,), operation.outputs)

    def write_state(self, operation: Operation) -> None:
        """Puts another array in the state's place."""
        state = self._state(operation)
        given = operation.inputs.get("data", ())
        if len(given) != 1:
            raise Unsupported("it has no data")
        slot = self.slots.operand(given[0])
        function = self._prepared(lambda x: x, [slot], set(), None)
        self._add_step(operation, function, (slot,), ((state, self._states[state]),))

    def _compute(self, operation: Operation) -> None:
        op = OPS.get(operation.type)
        if op is None:
            raise Unsupported("it is no operation that this interpreter knows")
        if not operation.outputs:
            raise Unsupported("it has no output")
        operands = {
            parameter: tuple(map(self.slots.operand, values))
            for parameter, values in operation.inputs.items()
        }
        types = {n: tuple(self.slots.types[s] for s in slots) for n, slots in operands.items()}
        given = Given(operation, self.slots.constants(operands), types)
        call = op.make(given)
        if strange := operands.keys() - given.asked:
            raise Unsupported(f"it has the input {sorted(strange)[0]}, which is not known here")
        slots, function = self._taking(call, operands, operation.outputs if op.arithmetic else ())
        self._add_step(operation, function, tuple(slots), operation.outputs)

    def _taking(
        self,
        call: Call,
        operands: Mapping[str, tuple[int, ...]],
        rounded: Sequence[tuple[str, TensorType]],
    ) -> tuple[list[int], Callable[..., Any]]:
        """The slots of a call's arguments, and its function of what those hold.

        `rounded`: the one output of an arithmetic operation, computed in float32 from what is
        float16, and rounded to its declared dtype; constants are widened once, here.
        """
        lazy = {slot for name in call.lazy for slot in operands[name]}
        slots = [slot for name in call.operands for slot in operands[name]]
        if not rounded:
            return slots, self._prepared(call.function, slots, lazy, None)
        ((_, type),) = rounded
        dtypes = {self.slots.types[slot].dtype for slot in slots}
        if type.dtype not in {"bool", *dtypes}:
            raise Unsupported(f"it gives {type.dtype} of {', '.join(sorted(dtypes))}")
        slots = [self.slots.widened(slot) for slot in slots]
        exact = {type.dtype, *dtypes} <= _AS_THEY_ARE
        result = None if exact else numpy_type(type.dtype)
        return slots, self._prepared(call.function, slots, lazy, result, arithmetic=True)

    def _prepared(
        self,
        function: Callable[..., Any],
        slots: Sequence[int],
        lazy: set[int],
        result: np.dtype | None,
        *,
        arithmetic: bool = False,
    ) -> Callable[..., Any]:
        """`function` with its arguments made what it takes, and its result cast to `result`."""
        prepare: list[tuple[int, Callable[[Any], Any]]] = []
        for index, slot in enumerate(slots):
            if isinstance(self.slots.values[slot], Weight):
                if slot not in lazy:
                    prepare.append((index, Weight.wide if arithmetic else Weight.whole))
            elif arithmetic and self.slots.types[slot].dtype == "float16":
                prepare.append((index, _widen))
        if not prepare and result is None:
            return function

        def call(*arguments: Any) -> Any:
            given = list(arguments)
            for index, change in prepare:
                given[index] = change(given[index])
            found = function(*given)
            return found if result is None else np.asarray(found).astype(result, copy=False)

        return call

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
        arguments: tuple[int, ...],
        results: Sequence[tuple[str, TensorType]],
    ) -> None:
        if strange := [type for _, type in results if type.dtype not in BITS]:
            raise Unsupported(f"it gives a {strange[0].dtype}")
        slots = tuple(
            self.slots.names[name] if name in self._states else self.slots.define(name, type)
            for name, type in results
        )
        types = tuple((known_shape(type), numpy_type(type.dtype)) for _, type in results)
        self._steps.append(Step(function, arguments, slots, types, (), operation))


_SPECIAL: dict[str, Callable[[Translator, Operation], None]] = {
    "const": Translator.constant,
    "read_state": Translator.read_state,
    "write_state": Translator.write_state,
}


def known_shape(type: TensorType) -> tuple[int, ...] | None:
    """The shape, if no dimension is unknown."""
    return None if UNKNOWN in type.shape else type.shape


def _widen(array: Any) -> Any:
    return array.astype(_F32)
