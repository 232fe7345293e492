"""What executes the functions of a Core ML package: Core ML itself, or the interpreter."""

import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.export.coreml.manifest import (
    HIDDEN,
    HIDDEN_OUTPUT,
    RECURRENT,
    RECURRENT_OUTPUT,
    CoreMLManifest,
    io_record,
    recurrent_layers,
    stored_states,
)
from rgexport.export.coreml.segments import PackagePlan, Segment, in_order
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
        """Runs a function and updates `state`; returns the outputs by name.

        A package without states is given None.
        """
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


_ROWS = -2
"""The axis along which packages share a state."""


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


def open_runner(folder: Path, manifest: CoreMLManifest) -> Runner:
    """Core ML on macOS, the interpreter elsewhere, for the packages in the folder of an artifact.

    Raises:
        RequestError: a package cannot be executed here.
    """
    return joined(
        manifest, {plan.name: _open(folder / plan.name, plan) for plan in manifest.packages}
    )


def _open(path: Path, plan: PackagePlan) -> Runner:
    if sys.platform == "darwin":
        return FrameworkRunner(path, plan.functions)
    from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner

    return InterpreterRunner(open_package(path))


def joined(manifest: CoreMLManifest, runners: Mapping[str, Runner]) -> Runner:
    """The runner of a whole model, from those of its packages by name."""
    if len(runners) == 1:
        return next(iter(runners.values()))
    return Pipeline(manifest, runners)


@dataclass(frozen=True)
class _Stage:
    """A segment in a package; `rows`: how many RG-LRU states are its."""

    package: str
    segment: Segment
    inputs: list[str]
    rows: int


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
        self._homes: dict[str, list[str]] = {}
        """State → the packages that have it, or rows of it."""
        for stage in self._stages:
            for name in stored_states(config, form, stage.segment):
                self._homes.setdefault(name, []).append(stage.package)

    def make_state(self) -> Any:
        """The states of all packages, by name."""
        stateful = {package for packages in self._homes.values() for package in packages}
        return {package: self._runners[package].make_state() for package in stateful}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """See `Runner`. Each segment has its own rows of the RG-LRU states."""
        carried, found = dict(inputs), dict[str, np.ndarray]()
        rows, first, after = inputs.get(RECURRENT), 0, list[np.ndarray]()
        for stage in self._stages:
            if rows is not None:
                carried[RECURRENT] = rows[first : first + stage.rows]
                first += stage.rows
            given = {name: carried[name] for name in stage.inputs}
            runner, name = self._runners[stage.package], stage.segment.function(function)
            made = runner.predict(name, given, state.get(stage.package))
            if RECURRENT_OUTPUT in made:
                after.append(made[RECURRENT_OUTPUT])
            if HIDDEN_OUTPUT in made:
                carried[HIDDEN] = made[HIDDEN_OUTPUT]
            found |= made
        return found | ({RECURRENT_OUTPUT: np.concatenate(after)} if after else {})

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """See `Runner`."""
        return np.concatenate(self._rows_of(state, name), axis=_ROWS)

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        """See `Runner`."""
        sizes = [rows.shape[_ROWS] for rows in self._rows_of(state, name)]
        parts = np.split(value, np.cumsum(sizes[:-1]), axis=_ROWS)
        for package, part in zip(self._homes[name], parts, strict=True):
            self._runners[package].write_state(state[package], name, part)

    def _rows_of(self, state: Any, name: str) -> list[np.ndarray]:
        """What each package has of a state [1, 1, n, width]."""
        packages = self._homes[name]
        return [self._runners[each].read_state(state[each], name) for each in packages]
