"""A package in Core ML itself, through coremltools: macOS 15 or later.

Written against the documentation of `coremltools.models.MLModel` and `MLState`; only a double of
them was run.
"""

import logging
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError


class FrameworkRunner:
    """One `MLModel` per function of a package; a state made by one serves all.

    Apple's documentation does not say that it does; docs/coreml.md names who relies on it.
    """

    engine = "Core ML"

    def __init__(self, path: Path, functions: Iterable[str]):
        """Has Core ML compile and load each function.

        Raises:
            NotInstalled: coremltools is not there.
            RequestError: Core ML cannot load the package.
        """
        tools = _coremltools()
        self.version = f"macOS {platform.mac_ver()[0]}, coremltools {tools.__version__}"
        self._models = {name: _load(tools, path, name) for name in functions}

    def make_state(self) -> Any:
        """The `MLState` of a conversation that has not begun: zeros."""
        return next(iter(self._models.values())).make_state()

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """The outputs of a function, which changes `state`."""
        outputs = self._models[function].predict(dict(inputs), state=state)
        return {name: np.asarray(value) for name, value in outputs.items()}

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """The array of a state."""
        return np.asarray(state.read_state(name))

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """Replaces the contents of a state."""
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
