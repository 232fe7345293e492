"""What executes the functions of a Core ML package."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.package import PACKAGE
from rgexport.export.coreml.states import DECODE, PREFILL
from rgexport.export.mil.package import open_package


class Runner(Protocol):
    """What executes the functions of a package. A state is whatever `make_state` gives."""

    engine: str
    version: str

    def make_state(self) -> Any:
        """The state of a conversation that has not begun."""
        ...

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """The outputs of a function, which changes `state`."""
        ...

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """The array of one state."""
        ...

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """Replaces one state."""
        ...


def open_runner(artifact: Artifact) -> Runner:
    """What executes an artifact's package on this machine.

    Raises:
        RequestError: it cannot be executed here.
    """
    path = artifact.file(PACKAGE)
    if sys.platform == "darwin":
        from rgexport.runtimes.coreml.framework import FrameworkRunner

        return FrameworkRunner(path, (DECODE, PREFILL))
    from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner

    return InterpreterRunner(open_package(path))
