"""A package in the interpreter, behind the interface that Core ML has too."""

from collections.abc import Mapping, Sequence

import numpy as np

from rgexport import __version__
from rgexport.export.mil.elements import numpy_type
from rgexport.export.mil.package import Package
from rgexport.runtimes.coreml.interpreter.interpreter import Interpreter, States
from rgexport.runtimes.coreml.interpreter.weights import WeightCache


class InterpreterRunner:
    """All functions of a package; they share the weights that are kept in memory."""

    engine, version = "MIL interpreter", __version__

    def __init__(
        self, package: Package, cache: WeightCache | None = None, *, also: Sequence[str] = ()
    ):
        """Translates every function.

        Args:
            package: what it executes.
            cache: of the weights; a new one by default.
            also: names of values that a call gives beside the outputs of its function.

        Raises:
            RequestError: an operation that the interpreter does not know.
        """
        cache = cache or WeightCache()
        self._functions = {
            name: Interpreter(package, name, cache, also) for name in package.functions
        }
        self._states = self._functions[package.default_function].states

    def make_state(self) -> States:
        """The state of a conversation that has not begun: zeros."""
        return {n: np.zeros(t.shape, numpy_type(t.dtype)) for n, t in self._states.items()}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: States
    ) -> dict[str, np.ndarray]:
        """The outputs of a function, which changes `state`."""
        return self._functions[function](inputs, state)

    def read_state(self, state: States, name: str) -> np.ndarray:
        """The array of a state; not to be changed."""
        return state[name]

    def write_state(self, state: States, name: str, value: np.ndarray) -> None:
        """Puts an array of the same shape and dtype in its place."""
        state[name] = value.astype(state[name].dtype).reshape(state[name].shape)
