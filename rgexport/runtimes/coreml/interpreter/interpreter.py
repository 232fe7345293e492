"""Executes the functions of a package in numpy, as calls on numbered slots.

Inside a run, float16 values are in float32 arrays: operations compute in float32, and round their
results to float16. Products are accumulated in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rgexport._version import __version__
from rgexport.artifacts.coreml.mil import program as mil
from rgexport.artifacts.coreml.mil.package import Package
from rgexport.errors import RequestError
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

_F32 = np.dtype(np.float32)
_FLOATS = ("float16", "float32")

FeatureStates = dict[str, np.ndarray]
"""The state of one sequence: name → array of the declared type."""


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
        self._types = {name: translator.types[slot] for name, slot in self._slots.items()}
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
            values[self._slots[name]] = _widened(array)
        for name in self._function.states:
            values[self._slots[name]] = _widened(states[name])
        with np.errstate(all="ignore"):
            for step in self._steps:
                values[step.result] = self._run(step, values)
                for slot in step.dead:
                    values[slot] = None
        for name in self._function.states:
            states[name] = self._narrowed(name, values)
        return {name: self._narrowed(name, values) for name in self._results}

    def _run(self, step: "_Step", values: list[Any]) -> Any:
        try:
            value = step.function(*[values[slot] for slot in step.arguments])
            if value.dtype != step.dtype or value.shape != step.shape:
                raise ValueError(f"it gave {value.dtype} {value.shape}; declared {step.shape}")
        except (ValueError, IndexError, TypeError) as error:
            operation = f"{step.operation.type} {step.operation.label}"
            raise RequestError(f"{self._where}: {operation} failed: {error}") from None
        return value

    def _narrowed(self, name: str, values: list[Any]) -> np.ndarray:
        """Returns a value in its declared dtype."""
        value: np.ndarray = values[self._slots[name]]
        return value.astype(mil.numpy_type(self._types[name].dtype), copy=False)


class InterpreterRunner:
    engine, version = "MIL interpreter", __version__

    def __init__(self, package: Package, extra_results: Sequence[str] = ()):
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
    function: Callable[..., Any]
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
        self.types: list[mil.TensorType] = []
        """The declared type of each slot."""
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
            slot = self._whole(operation, self._operand(data[0]))
            if self.types[slot].dtype != self.types[state].dtype:
                raise Unsupported(f"it writes {self.types[slot]} into {self.types[state]}")
            self._add_step(operation, _same, [slot], state)
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
            self._add_step(operation, _same, [self._state(operation)], self._define(name, type))
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
        self.types.append(type)
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
        return _widened(whole_constant(self._package, value))

    def _whole(self, operation: mil.Operation, slot: int) -> int:
        """Returns a slot with an array: of a weight in a file, one that another step reads."""
        if not isinstance(self.values[slot], FileWeight):
            return slot
        array = self._new(self.types[slot], None)
        self._add_step(operation, FileWeight.whole, [slot], array)
        return array

    def _compute(self, operation: mil.Operation, name: str, type: mil.TensorType) -> None:
        if operation.type not in OPS:
            raise Unsupported("it is no operation that this interpreter knows")
        operands = {n: tuple(map(self._operand, v)) for n, v in operation.inputs.items()}
        singles = {n: self.values[slots[0]] for n, slots in operands.items() if len(slots) == 1}
        inputs = OperationInputs(
            {n: value for n, value in singles.items() if isinstance(value, np.ndarray)},
            {n for n, slots in operands.items() if slots},
            type,
        )
        call = OPS[operation.type](inputs)
        if unknown := operands.keys() - inputs.names_read:
            raise Unsupported(f"it has the input {min(unknown)}, which is not known here")
        slots = [slot for name in call.operands for slot in operands[name]]
        dtypes = {self.types[slot].dtype for slot in slots}
        if operation.type != "cast" and type.dtype not in {"bool", *dtypes}:
            raise Unsupported(f"it gives {type.dtype} of {', '.join(sorted(dtypes))}")
        lazy = {slot for name in call.lazy for slot in operands[name]}
        slots = [slot if slot in lazy else self._whole(operation, slot) for slot in slots]
        function = call.function
        if operation.type in ARITHMETIC and type.dtype in ("float16", "int32"):
            function = partial(_rounded, function, mil.numpy_type(type.dtype))
        self._add_step(operation, function, slots, self._define(name, type))

    def _state(self, operation: mil.Operation) -> int:
        values = operation.inputs.get("input", ())
        name = values[0].name if len(values) == 1 and isinstance(values[0], mil.Name) else ""
        if name not in self._states:
            raise Unsupported(f"{name or 'its input'} is no state of the function")
        return self.names[name]

    def _add_step(
        self,
        operation: mil.Operation,
        function: Callable[..., Any],
        arguments: Sequence[int],
        result: int,
    ) -> None:
        type = self.types[result]
        if type.dtype not in mil.BITS or mil.UNKNOWN in type.shape:
            raise Unsupported(f"it gives {type}; expected numbers, as many as are known before")
        dtype = _F32 if type.dtype == "float16" else mil.numpy_type(type.dtype)
        step = _Step(function, tuple(arguments), result, type.shape, dtype, (), operation)
        self._steps.append(step)


def _rounded(function: Callable[..., Any], dtype: np.dtype, *arguments: Any) -> np.ndarray:
    return _widened(np.asarray(function(*arguments)).astype(dtype, copy=False))


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _widened(array: np.ndarray) -> np.ndarray:
    return array.astype(_F32) if array.dtype == np.float16 else array
