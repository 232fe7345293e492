"""What executes the functions of a Core ML package: Core ML itself, or the interpreter."""

import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.coreml.package import PACKAGE
from rgexport.export.coreml.states import DECODE, PREFILL
from rgexport.export.mil.package import open_package


class Runner(Protocol):
    """Executes the functions of a package; a state is what its `make_state` returns."""

    engine: str
    version: str

    def make_state(self) -> Any:
        """The state of a new conversation."""
        ...

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """Runs a function and updates `state`; returns the outputs by name."""
        ...

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """The array of one state."""
        ...

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """Replaces one state."""
        ...


class FrameworkRunner:
    """A package in Core ML itself, through coremltools, on macOS 15 or later.

    One `MLModel` per function; all share the state that one of them made. Apple's documentation
    does not promise that; docs/coreml.md names projects that rely on it. Written against the
    documentation of `coremltools.models.MLModel` and `MLState`, and only run with a double of them.
    """

    engine = "Core ML"

    def __init__(self, path: Path, functions: Iterable[str]):
        """Has Core ML compile and load each function.

        Raises:
            NotInstalled: coremltools is missing.
            RequestError: Core ML cannot load the package.
        """
        tools = _coremltools()
        self.version = f"macOS {platform.mac_ver()[0]}, coremltools {tools.__version__}"
        self._models = {name: _load(tools, path, name) for name in functions}

    def make_state(self) -> Any:
        """An `MLState` of zeros."""
        return next(iter(self._models.values())).make_state()

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """See `Runner`."""
        outputs = self._models[function].predict(dict(inputs), state=state)
        return {name: np.asarray(value) for name, value in outputs.items()}

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """See `Runner`."""
        return np.asarray(state.read_state(name))

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """See `Runner`."""
        state.write_state(name, np.ascontiguousarray(value, np.float16))


def _coremltools() -> Any:
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of versions of torch
    try:
        import coremltools
    except ImportError:
        raise NotInstalled(
            "Core ML needs coremltools here; install it: pip install 'rgexport[coreml]'"
        ) from None
    return coremltools


def _load(tools: Any, path: Path, function: str) -> Any:
    # States with the Neural Engine are young; CPU and GPU have them without restrictions.
    units = tools.ComputeUnit.CPU_AND_GPU
    try:
        return tools.models.MLModel(str(path), compute_units=units, function_name=function)
    except Exception as error:  # coremltools raises bare exceptions and RuntimeErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"Core ML cannot load {function} of {path}: {reason}") from None


def open_runner(artifact: Artifact) -> Runner:
    """Core ML on macOS, the interpreter elsewhere.

    Raises:
        RequestError: the package cannot be executed here.
    """
    path = artifact.file(PACKAGE)
    if sys.platform == "darwin":
        return FrameworkRunner(path, (DECODE, PREFILL))
    from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner

    return InterpreterRunner(open_package(path))
