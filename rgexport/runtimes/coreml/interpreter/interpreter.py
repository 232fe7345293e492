"""Executes the functions of a package in numpy, as calls on numbered slots.

Float16 values are computed in float32 and rounded after every operation; products are accumulated
in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rgexport._version import __version__
from rgexport.errors import RequestError
from rgexport.export.mil import program as mil
from rgexport.export.mil.package import Package
from rgexport.runtimes.coreml.interpreter.operations import ARITHMETIC, OPS, OperationInputs
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
_UNCONVERTED = {"float32", "bool"}  # dtypes that arithmetic takes and gives as they are

FeatureStates = dict[str, np.ndarray]
"""The state of one sequence: name → array of the declared type."""
Converter = Callable[[Any], Any] | None
Call = Callable[..., Any]


class Interpreter:
    def __init__(
        self, package: Package, function: str, cache: WeightCache, extra_results: Sequence[str] = ()
    ):
        """Translates a function; a run also returns the `extra_results` that it has."""
        self._function = package.functions[function]
        self._where = f"{package.path}: {function}"
        translator = _Translator(package, self._function, cache)
        for operation in self._function.operations:
            try:
                translator.add(operation)
            except (Unsupported, ValueError, TypeError, LookupError, ArithmeticError) as error:
                raise RequestError(
                    f"{self._where}: {operation.type} {operation.label} cannot be executed: {error}"
                ) from None
        self._start, self._slots = translator.values, translator.names
        if missing := [name for name in self._function.outputs if name not in self._slots]:
            raise RequestError(f"{self._where}: nothing computes the output {missing[0]}")
        extra = (name for name in extra_results if name in self._slots)
        self._results = tuple(dict.fromkeys((*self._function.outputs, *extra)))
        self._steps = translator.finished(self._results)

    def __call__(
        self, inputs: Mapping[str, np.ndarray], states: FeatureStates
    ) -> dict[str, np.ndarray]:
        """Runs once; `states` gets new arrays, and the old ones are unchanged."""
        values = list(self._start)
        for name, type in self._function.inputs.items():
            if inputs[name].shape != type.shape:
                raise RequestError(
                    f"{self._where}: input {name} is {inputs[name].shape}; expected {type}"
                )
            array = np.ascontiguousarray(inputs[name], mil.numpy_type(type.dtype))
            values[self._slots[name]] = array
        for name in self._function.states:
            values[self._slots[name]] = states[name]
        with np.errstate(all="ignore"):
            for function, arguments, result, shape, dtype, dead, operation in self._steps:
                try:
                    value = function(*[values[slot] for slot in arguments])
                    if value.dtype != dtype or value.shape != shape:
                        raise ValueError(f"it gave {value.dtype} {value.shape}; declared {shape}")
                except (ValueError, IndexError, TypeError) as error:
                    raise RequestError(
                        f"{self._where}: {operation.type} {operation.label} failed: {error}"
                    ) from None
                values[result] = value
                for slot in dead:
                    values[slot] = None
        for name in self._function.states:
            states[name] = values[self._slots[name]]
        return {name: values[self._slots[name]] for name in self._results}


class InterpreterRunner:
    engine, version = "MIL interpreter", __version__

    def __init__(self, package: Package, *, extra_results: Sequence[str] = ()):
        cache = WeightCache()
        self._functions = {
            name: Interpreter(package, name, cache, extra_results) for name in package.functions
        }
        self._states = package.functions[package.default_function].states

    def make_state(self) -> FeatureStates:
        return {n: np.zeros(t.shape, mil.numpy_type(t.dtype)) for n, t in self._states.items()}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: FeatureStates | None
    ) -> dict[str, np.ndarray]:
        return self._functions[function](inputs, {} if state is None else state)

    def read_state(self, state: FeatureStates, name: str) -> np.ndarray:
        return state[name]

    def write_state(self, state: FeatureStates, name: str, value: np.ndarray) -> None:
        state[name] = value.astype(state[name].dtype).reshape(state[name].shape)


class _Step(NamedTuple):
    function: Call
    arguments: tuple[int, ...]
    result: int
    shape: tuple[int, ...]
    dtype: np.dtype
    dead: tuple[int, ...]
    operation: mil.Operation


class _Translator:
    def __init__(self, package: Package, function: mil.Function, cache: WeightCache):
        self.values: list[Any] = []
        """The value of each slot when a run starts; None before it is computed."""
        self.names: dict[str, int] = {}
        """The slot of each value that has a name."""
        self._types: list[mil.TensorType] = []
        self._wide: dict[int, int] = {}
        self._steps: list[_Step] = []
        self._package, self._states, self._cache = package, function.states, cache
        for name, type in (function.inputs | function.states).items():
            self._define(name, type)

    def add(self, operation: mil.Operation) -> None:
        if operation.blocks:
            raise Unsupported("it has blocks of its own")
        if operation.type == "write_state":
            # Another array takes the state's place: the old one is not changed.
            state, data = self._state(operation), operation.inputs.get("data", ())
            if len(data) != 1:
                raise Unsupported("it has no data")
            slot = self._operand(data[0])
            function = _converted(_same, [self._converter(slot, arithmetic=False)], None)
            self._add_step(operation, function, [slot], state)
            return
        if len(operation.outputs) != 1:
            raise Unsupported(f"it has {len(operation.outputs)} outputs; expected 1")
        ((name, type),) = operation.outputs
        if operation.type == "const":
            if "val" not in operation.attributes:
                raise Unsupported("it has no value")
            self._define(name, type, self._load(operation.attributes["val"]))
        elif operation.type.startswith("constexpr_"):
            self._define(name, type, compressed_weight(self._package, operation, self._cache))
        elif operation.type == "read_state":
            state = self._state(operation)
            self._add_step(operation, _same, [state], self._define(name, type))
        else:
            self._compute(operation, name, type)

    def finished(self, outputs: Sequence[str]) -> list[_Step]:
        alive = {slot for slot, value in enumerate(self.values) if value is not None}
        alive.update(self.names[name] for name in (*self._states, *outputs))
        done = []
        for step in reversed(self._steps):
            dead = {*step.arguments, step.result} - alive
            alive |= dead
            done.append(step._replace(dead=tuple(dead)))
        return done[::-1]

    def _new(self, type: mil.TensorType, value: Any) -> int:
        self.values.append(value)
        self._types.append(type)
        return len(self.values) - 1

    def _define(self, name: str, type: mil.TensorType, value: Any = None) -> int:
        if name in self.names:
            raise Unsupported(f"{name} is computed twice")
        self.names[name] = self._new(type, value)
        return self.names[name]

    def _operand(self, value: mil.Value) -> int:
        if not isinstance(value, mil.Name):
            return self._new(value.type, self._load(value))
        if value.name not in self.names:
            raise Unsupported(f"nothing computes {value.name} before it")
        return self.names[value.name]

    def _load(self, value: mil.Constant) -> np.ndarray | FileWeight:
        """Returns a constant as an array, or a large one of floats as a weight to be read later."""
        kind = value.type
        is_large = kind.dtype in _FLOATS and kind.shape and kind.nbytes > SMALL_BYTES
        if isinstance(value, mil.FileValue) and is_large:
            return file_weight(self._package, value, self._cache)
        return whole_constant(self._package, value)

    def _widened(self, slot: int) -> int:
        """Returns the slot of the same values in float32, where `slot` has a float16 constant."""
        value, type = self.values[slot], self._types[slot]
        if type.dtype != "float16" or not isinstance(value, np.ndarray):
            return slot
        if slot not in self._wide:
            self._wide[slot] = self._new(mil.TensorType("float32", type.shape), _widen(value))
        return self._wide[slot]

    def _compute(self, operation: mil.Operation, name: str, type: mil.TensorType) -> None:
        if operation.type not in OPS:
            raise Unsupported("it is no operation that this interpreter knows")
        operands = {n: tuple(map(self._operand, v)) for n, v in operation.inputs.items()}
        singles = {n: self.values[slots[0]] for n, slots in operands.items() if len(slots) == 1}
        inputs = OperationInputs(
            {n: value for n, value in singles.items() if isinstance(value, np.ndarray)},
            {n for n, slots in operands.items() if slots},
        )
        call = OPS[operation.type](inputs)
        if unknown := operands.keys() - inputs.names_read:
            raise Unsupported(f"it has the input {min(unknown)}, which is not known here")
        slots = [slot for name in call.operands for slot in operands[name]]
        arithmetic, result = operation.type in ARITHMETIC, None
        if arithmetic:
            dtypes = {self._types[slot].dtype for slot in slots}
            if type.dtype not in {"bool", *dtypes}:
                raise Unsupported(f"it gives {type.dtype} of {', '.join(sorted(dtypes))}")
            if not {type.dtype, *dtypes} <= _UNCONVERTED:
                result = mil.numpy_type(type.dtype)
            slots = [self._widened(slot) for slot in slots]
        lazy = {slot for name in call.lazy for slot in operands[name]}
        converters = [None if s in lazy else self._converter(s, arithmetic) for s in slots]
        function = _converted(call.function, converters, result)
        self._add_step(operation, function, slots, self._define(name, type))

    def _converter(self, slot: int, arithmetic: bool) -> Converter:
        if isinstance(self.values[slot], FileWeight):
            return FileWeight.wide if arithmetic else FileWeight.whole
        return _widen if arithmetic and self._types[slot].dtype == "float16" else None

    def _state(self, operation: mil.Operation) -> int:
        values = operation.inputs.get("input", ())
        name = values[0].name if len(values) == 1 and isinstance(values[0], mil.Name) else ""
        if name not in self._states:
            raise Unsupported(f"{name or 'its input'} is no state of the function")
        return self.names[name]

    def _add_step(
        self, operation: mil.Operation, function: Call, arguments: Sequence[int], result: int
    ) -> None:
        type = self._types[result]
        if type.dtype not in mil.BITS or mil.UNKNOWN in type.shape:
            raise Unsupported(f"it gives {type}; expected numbers, as many as are known before")
        dtype = mil.numpy_type(type.dtype)
        step = _Step(function, tuple(arguments), result, type.shape, dtype, (), operation)
        self._steps.append(step)


def _converted(function: Call, converters: Sequence[Converter], result: np.dtype | None) -> Call:
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
