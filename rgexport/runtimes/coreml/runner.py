"""Runs the functions of Core ML packages: on macOS in Core ML, elsewhere in rgexport's interpreter.

An artifact has one package, or several that run in turn. A package has the functions `decode` (one
token) and `prefill` (a fixed number of tokens) of each of its segments. Core ML keeps states from
call to call: the caches of attention and convolutions, and with `--recurrent-state hilo` also the
RG-LRU states, which otherwise are an input and an output.
"""

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
from rgexport.export.coreml.package import Segment, in_order
from rgexport.export.mil.package import open_package

_LAYER_AXIS = -2
"""Axis along which packages share the RG-LRU states hi and lo, [1, 1, layers, width].

All other states belong to one layer, so they are in one package.
"""


class Runner(Protocol):
    """An engine with one package loaded, or a `Pipeline` of such engines.

    Attributes:
        engine: the engine's name.
        version: the engine's version.
    """

    engine: str
    version: str

    def make_state(self) -> Any:
        """Returns new states, all zero; only the runner knows their type."""
        ...

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """Runs a function, which updates `state` in place; returns the outputs by name.

        `state` is None for a package without states.
        """
        ...

    def read_state(self, state: Any, name: str) -> np.ndarray: ...

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None: ...


class FrameworkRunner:
    """One package in Core ML, through coremltools, on macOS 15 or later.

    Each function is an `MLModel`. The first one makes the state, and all functions use it. Apple's
    documentation does not promise that this works; docs/coreml.md names projects that rely on it.
    This class was written from the documentation of `coremltools.models.MLModel` and `MLState`;
    tests replace both, and it has never run on a Mac.
    """

    engine = "Core ML"

    def __init__(self, path: Path, functions: Iterable[str]):
        """Compiles and loads each function.

        Raises:
            NotInstalled: coremltools is missing.
            RequestError: Core ML cannot load the package.
        """
        logging.getLogger("coremltools").setLevel(logging.ERROR)  # it warns about torch versions
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
    # CPU and GPU support states without restrictions; the Neural Engine's support is recent.
    units = tools.ComputeUnit.CPU_AND_GPU
    try:
        return tools.models.MLModel(str(path), compute_units=units, function_name=function)
    except Exception as error:  # coremltools raises bare exceptions and RuntimeErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"Core ML cannot load {function} of {path}: {reason}") from None


def open_runner(folder: Path, manifest: CoreMLManifest) -> Runner:
    """Opens the packages of an artifact in Core ML on macOS, elsewhere in the interpreter.

    Raises:
        RequestError: a package cannot be loaded, or has an op that the interpreter lacks.
    """
    runners: dict[str, Runner] = {}
    for plan in manifest.packages:
        path = folder / plan.name
        if sys.platform == "darwin":
            runners[plan.name] = FrameworkRunner(path, plan.functions)
        else:
            from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner

            runners[plan.name] = InterpreterRunner(open_package(path))
    return combine(manifest, runners)


def combine(manifest: CoreMLManifest, runners: Mapping[str, Runner]) -> Runner:
    """Returns one runner for all packages; `runners` has package → runner."""
    if len(runners) == 1:
        return next(iter(runners.values()))
    return Pipeline(manifest, runners)


@dataclass(frozen=True)
class _Stage:
    """A segment of the model and the package that has it; some packages have two segments."""

    package: str
    segment: Segment
    inputs: list[str]
    recurrent_layers: int
    """Number of its layers with an RG-LRU state."""


class Pipeline:
    """Runs several packages in turn; each segment takes the hidden state of the segment before."""

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
        """State → the packages that have it or some layers of it, in the order of layers."""
        for stage in self._stages:
            for name in stored_states(config, form, stage.segment):
                self._state_packages.setdefault(name, []).append(stage.package)

    def make_state(self) -> Any:
        stateful = {package for packages in self._state_packages.values() for package in packages}
        return {package: self._runners[package].make_state() for package in stateful}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """Runs all segments; returns the outputs of all, by name.

        If the RG-LRU states [layers, width] are an input, each segment takes those of its layers.
        """
        values, outputs = dict(inputs), dict[str, np.ndarray]()
        recurrent, first_layer = inputs.get(RECURRENT), 0
        new_recurrent: list[np.ndarray] = []
        for stage in self._stages:
            if recurrent is not None:
                end_layer = first_layer + stage.recurrent_layers
                values[RECURRENT] = recurrent[first_layer:end_layer]
                first_layer = end_layer
            stage_outputs = self._runners[stage.package].predict(
                stage.segment.function(function),
                {name: values[name] for name in stage.inputs},
                state.get(stage.package),
            )
            if RECURRENT_OUTPUT in stage_outputs:
                new_recurrent.append(stage_outputs[RECURRENT_OUTPUT])
            if HIDDEN_OUTPUT in stage_outputs:
                values[HIDDEN] = stage_outputs[HIDDEN_OUTPUT]
            outputs |= stage_outputs
        if new_recurrent:
            outputs[RECURRENT_OUTPUT] = np.concatenate(new_recurrent)
        return outputs

    def read_state(self, state: Any, name: str) -> np.ndarray:
        return np.concatenate(self._read_pieces(state, name), axis=_LAYER_AXIS)

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        layers = [piece.shape[_LAYER_AXIS] for piece in self._read_pieces(state, name)]
        pieces = np.split(value, np.cumsum(layers[:-1]), axis=_LAYER_AXIS)
        for package, piece in zip(self._state_packages[name], pieces, strict=True):
            self._runners[package].write_state(state[package], name, piece)

    def _read_pieces(self, state: Any, name: str) -> list[np.ndarray]:
        """Reads a state from all packages that have layers of it."""
        return [
            self._runners[package].read_state(state[package], name)
            for package in self._state_packages[name]
        ]
