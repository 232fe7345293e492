"""Executes the functions of Core ML packages, in Core ML itself or in the interpreter."""

import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.coreml.segments import Segment, in_order
from rgexport.export.coreml.states import (
    HIDDEN,
    HIDDEN_OUTPUT,
    RECURRENT,
    RECURRENT_OUTPUT,
    io_record,
    recurrent_layers,
    stored_states,
)
from rgexport.export.mil.package import open_package

_ROWS = -2
"""The axis along which packages share a state."""


class Runner(Protocol):
    """Executes the functions of a package; a state is what its `make_state` returns."""

    engine: str
    version: str

    def make_state(self) -> Any: ...

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """Runs a function and updates `state`; returns the outputs by name.

        A package without states is given None.
        """
        ...

    def read_state(self, state: Any, name: str) -> np.ndarray: ...

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None: ...


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
        logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns of versions of torch
        try:
            import coremltools as tools
        except ImportError:
            raise NotInstalled(
                "Core ML needs coremltools here; install it: pip install 'rgexport[coreml]'"
            ) from None
        self.version = f"macOS {platform.mac_ver()[0]}, coremltools {tools.__version__}"
        self._models = {name: _load(tools, path, name) for name in functions}

    def make_state(self) -> Any:
        return next(iter(self._models.values())).make_state()

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        outputs = self._models[function].predict(dict(inputs), state=state)
        return {name: np.asarray(value) for name, value in outputs.items()}

    def read_state(self, state: Any, name: str) -> np.ndarray:
        return np.asarray(state.read_state(name))

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        state.write_state(name, np.ascontiguousarray(value, np.float16))


def _load(tools: Any, path: Path, function: str) -> Any:
    # States with the Neural Engine are young; CPU and GPU have them without restrictions.
    units = tools.ComputeUnit.CPU_AND_GPU
    try:
        return tools.models.MLModel(str(path), compute_units=units, function_name=function)
    except Exception as error:  # coremltools raises bare exceptions and RuntimeErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"Core ML cannot load {function} of {path}: {reason}") from None


def open_runner(folder: Path, manifest: CoreMLManifest) -> Runner:
    """Opens the packages of an artifact in Core ML on macOS, elsewhere in the interpreter.

    Raises:
        RequestError: a package cannot be executed here.
    """
    runners: dict[str, Runner] = {}
    for plan in manifest.packages:
        path = folder / plan.name
        if sys.platform == "darwin":
            runners[plan.name] = FrameworkRunner(path, plan.functions)
        else:
            from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner

            runners[plan.name] = InterpreterRunner(open_package(path))
    return joined(manifest, runners)


def joined(manifest: CoreMLManifest, runners: Mapping[str, Runner]) -> Runner:
    if len(runners) == 1:
        return next(iter(runners.values()))
    return Pipeline(manifest, runners)


@dataclass(frozen=True)
class _Stage:
    """A segment in a package, with its number of RG-LRU states."""

    package: str
    segment: Segment
    inputs: list[str]
    recurrent_states: int


class Pipeline:
    """Packages that are run in turn; each takes the hidden state of the one before."""

    def __init__(self, manifest: CoreMLManifest, runners: Mapping[str, Runner]):
        self._runners = runners
        self.engine = next(iter(runners.values())).engine
        self.version = next(iter(runners.values())).version
        config, form = manifest.config, manifest.form
        self._stages = [
            _Stage(
                plan.name,
                segment,
                [value.name for value in io_record(config, form, segment).inputs],
                len(recurrent_layers(config, segment)),
            )
            for plan, segment in in_order(manifest.packages)
        ]
        self._state_packages: dict[str, list[str]] = {}
        """State → the packages that have it, or rows of it."""
        for stage in self._stages:
            for name in stored_states(config, form, stage.segment):
                self._state_packages.setdefault(name, []).append(stage.package)

    def make_state(self) -> Any:
        stateful = {package for packages in self._state_packages.values() for package in packages}
        return {package: self._runners[package].make_state() for package in stateful}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """Runs all segments, each on its own rows of the RG-LRU states."""
        carried, outputs = dict(inputs), dict[str, np.ndarray]()
        rows, first, next_rows = inputs.get(RECURRENT), 0, list[np.ndarray]()
        for stage in self._stages:
            if rows is not None:
                carried[RECURRENT] = rows[first : first + stage.recurrent_states]
                first += stage.recurrent_states
            stage_inputs = {name: carried[name] for name in stage.inputs}
            runner, name = self._runners[stage.package], stage.segment.function(function)
            results = runner.predict(name, stage_inputs, state.get(stage.package))
            if RECURRENT_OUTPUT in results:
                next_rows.append(results[RECURRENT_OUTPUT])
            if HIDDEN_OUTPUT in results:
                carried[HIDDEN] = results[HIDDEN_OUTPUT]
            outputs |= results
        return outputs | ({RECURRENT_OUTPUT: np.concatenate(next_rows)} if next_rows else {})

    def read_state(self, state: Any, name: str) -> np.ndarray:
        return np.concatenate(self._rows_of(state, name), axis=_ROWS)

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        sizes = [rows.shape[_ROWS] for rows in self._rows_of(state, name)]
        parts = np.split(value, np.cumsum(sizes[:-1]), axis=_ROWS)
        for package, part in zip(self._state_packages[name], parts, strict=True):
            self._runners[package].write_state(state[package], name, part)

    def _rows_of(self, state: Any, name: str) -> list[np.ndarray]:
        return [
            self._runners[package].read_state(state[package], name)
            for package in self._state_packages[name]
        ]
