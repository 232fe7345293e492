"""Executes the functions of a package in numpy.

Float16 values are computed in float32 and rounded after every operation; products are accumulated
in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rgexport._version import __version__
from rgexport.errors import RequestError
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import TensorType, numpy_type
from rgexport.runtimes.coreml.interpreter.translator import Translator
from rgexport.runtimes.coreml.interpreter.weights import Unsupported, WeightCache

FeatureStates = dict[str, np.ndarray]
"""The state of one sequence: name → array of the declared type."""


class Interpreter:
    """One function of a package, ready to run."""

    def __init__(
        self, package: Package, function: str, cache: WeightCache, extra_results: Sequence[str] = ()
    ):
        """Translates a function; no large weight is read.

        Args:
            package: the package of the function.
            function: its name.
            cache: keeps weights in memory.
            extra_results: names of values that a run returns too, if the function has them.

        Raises:
            RequestError: an operation, or a form of one, that rgexport does not emit; a blob that
                does not agree with the program.
        """
        self._function = package.functions[function]
        self._where = f"{package.path}: {function}"
        translator = Translator(package, self._function, cache)
        for operation in self._function.operations:
            try:
                translator.add(operation)
            except (Unsupported, ValueError, TypeError, LookupError, ArithmeticError) as error:
                raise RequestError(
                    f"{self._where}: {operation.type} {operation.label} cannot be executed: {error}"
                ) from None
        self._start, self._slots = translator.slots.values, translator.slots.names
        missing = [name for name in self._function.outputs if name not in self._slots]
        if missing:
            raise RequestError(f"{self._where}: nothing computes the output {missing[0]}")
        extra = (name for name in extra_results if name in self._slots)
        self._results = tuple(dict.fromkeys((*self._function.outputs, *extra)))
        self._steps = translator.finished(self._results)

    @property
    def states(self) -> dict[str, TensorType]:
        return self._function.states

    def __call__(
        self, inputs: Mapping[str, np.ndarray], states: FeatureStates
    ) -> dict[str, np.ndarray]:
        """Runs once; `states` gets new arrays, and the old ones are unchanged.

        Raises:
            RequestError: an input of another shape, or an operation that fails.
        """
        values = list(self._start)
        for name, type in self._function.inputs.items():
            values[self._slots[name]] = self._input(name, inputs[name], type)
        for name in self._function.states:
            values[self._slots[name]] = states[name]
        with np.errstate(all="ignore"):
            self._run(values)
        for name in self._function.states:
            states[name] = values[self._slots[name]]
        return {name: values[self._slots[name]] for name in self._results}

    def _run(self, values: list[Any]) -> None:
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

    def _input(self, name: str, array: np.ndarray, type: TensorType) -> np.ndarray:
        if array.shape != type.shape:
            raise RequestError(f"{self._where}: input {name} is {array.shape}; expected {type}")
        return np.ascontiguousarray(array, numpy_type(type.dtype))


class InterpreterRunner:
    engine, version = "MIL interpreter", __version__

    def __init__(self, package: Package, *, extra_results: Sequence[str] = ()):
        """Translates every function.

        Args:
            package: the package to execute.
            extra_results: names of values that a call returns beside the outputs of its function.

        Raises:
            RequestError: an operation that rgexport does not emit.
        """
        cache = WeightCache()
        self._functions = {
            name: Interpreter(package, name, cache, extra_results) for name in package.functions
        }
        self._states = self._functions[package.default_function].states

    def make_state(self) -> FeatureStates:
        return {n: np.zeros(t.shape, numpy_type(t.dtype)) for n, t in self._states.items()}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: FeatureStates | None
    ) -> dict[str, np.ndarray]:
        return self._functions[function](inputs, {} if state is None else state)

    def read_state(self, state: FeatureStates, name: str) -> np.ndarray:
        """Returns the array of a state, which must not be changed."""
        return state[name]

    def write_state(self, state: FeatureStates, name: str, value: np.ndarray) -> None:
        state[name] = value.astype(state[name].dtype).reshape(state[name].shape)
