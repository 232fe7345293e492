"""Core ML packages behind the Session interface: Core ML on macOS, the interpreter elsewhere.

A package has the functions `decode` (one token) and `prefill` (a fixed number of tokens) of each of
its segments. Core ML keeps states from call to call: the caches of attention and convolutions, and
with `--recurrent-state hilo` also the RG-LRU states, which otherwise are an input and an output.
"""

import logging
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.coreml import manifest as interface
from rgexport.artifacts.coreml.mil.package import open_package
from rgexport.artifacts.coreml.package import DECODE, PREFILL, Segment, in_order
from rgexport.artifacts.manifest import ACTIVATIONS, StateRecord
from rgexport.errors import NotInstalled, RequestError, reason
from rgexport.griffin.state import POSITION, State, state_specs
from rgexport.parallelism import usable_threads
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner
from rgexport.runtimes.session import Session, SessionInfo, UnchangedFiles

_LO_SCALE = np.float32(interface.LO_SCALE)
_LAYER_AXIS = -2  # axis along which packages share the RG-LRU states [1, 1, layers, width]


class FrameworkRunner:
    """One package in Core ML, through coremltools, on macOS 15 or later.

    Each function is an `MLModel`. The first one makes the state that all use, which Apple's
    documentation does not promise to work; docs/coreml.md names projects that rely on it. Tests
    replace `MLModel` and `MLState`: this class has never run on a Mac.
    """

    engine = "Core ML"

    def __init__(self, path: Path, functions: Iterable[str]):
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
        raise RequestError(f"Core ML cannot load {function} of {path}: {reason(error)}") from None


Runner = FrameworkRunner | InterpreterRunner
"""One loaded package; `predict` updates its state in place, which is None where there is none."""


def _open_runner(path: Path, functions: Iterable[str]) -> Runner:
    if sys.platform == "darwin":
        return FrameworkRunner(path, functions)
    return InterpreterRunner(open_package(path))


class _Stage(NamedTuple):
    package: str
    segment: Segment
    inputs: list[str]
    recurrent_layers: int


class Pipeline:
    """Runs all packages in turn; each segment takes the hidden state of the segment before."""

    def __init__(self, manifest: interface.CoreMLManifest, runners: Mapping[str, Runner]):
        self._runners = runners
        config, form = manifest.config, manifest.form
        self._stages = [
            _Stage(
                plan.name,
                segment,
                [value.name for value in interface.io_record(config, form, segment).inputs],
                len(interface.recurrent_layers(config, segment)),
            )
            for plan, segment in in_order(manifest.packages)
        ]
        self._state_packages: dict[str, list[str]] = {}
        """State → the packages that have it or some layers of it, in the order of layers."""
        for stage in self._stages:
            for name in interface.stored_states(config, form, stage.segment):
                self._state_packages.setdefault(name, []).append(stage.package)

    def make_state(self) -> Any:
        stateful = {package for packages in self._state_packages.values() for package in packages}
        return {package: self._runners[package].make_state() for package in stateful}

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        values, outputs = dict(inputs), dict[str, np.ndarray]()
        first_layer, new_recurrent = 0, list[np.ndarray]()
        for stage in self._stages:
            if interface.RECURRENT in inputs:
                end_layer = first_layer + stage.recurrent_layers
                values[interface.RECURRENT] = inputs[interface.RECURRENT][first_layer:end_layer]
                first_layer = end_layer
            stage_outputs = self._runners[stage.package].predict(
                stage.segment.function(function),
                {name: values[name] for name in stage.inputs},
                state.get(stage.package),
            )
            if interface.RECURRENT_OUTPUT in stage_outputs:
                new_recurrent.append(stage_outputs[interface.RECURRENT_OUTPUT])
            if interface.HIDDEN_OUTPUT in stage_outputs:
                values[interface.HIDDEN] = stage_outputs[interface.HIDDEN_OUTPUT]
            outputs |= stage_outputs
        if new_recurrent:
            outputs[interface.RECURRENT_OUTPUT] = np.concatenate(new_recurrent)
        return outputs

    def read_state(self, state: Any, name: str) -> np.ndarray:
        return np.concatenate(self._read_pieces(state, name), axis=_LAYER_AXIS)

    def write_state(self, state: Any, name: str, value: np.ndarray) -> None:
        layers = [piece.shape[_LAYER_AXIS] for piece in self._read_pieces(state, name)]
        pieces = np.split(value, np.cumsum(layers[:-1]), axis=_LAYER_AXIS)
        for package, piece in zip(self._state_packages[name], pieces, strict=True):
            self._runners[package].write_state(state[package], name, piece)

    def _read_pieces(self, state: Any, name: str) -> list[np.ndarray]:
        return [self._runners[p].read_state(state[p], name) for p in self._state_packages[name]]


@dataclass
class SequenceState:
    """The state of a sequence: in the runner, and as inputs and outputs of each call."""

    in_runner: Any
    carried: dict[str, np.ndarray]
    position: int = 0


class StateConverter:
    """Converts the canonical states of a sequence to the features of a package, and back.

    The RG-LRU states of all layers are the rows of one matrix, in the order of the manifest.
    """

    def __init__(self, manifest: interface.CoreMLManifest, pipeline: Pipeline):
        self._pipeline = pipeline
        specs = state_specs(manifest.config, ACTIVATIONS[manifest.compute])
        self.shapes = {spec.name: spec.shape for spec in specs}
        self._empty = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}
        self._matrices = [r for r in manifest.states if r.layout not in ("row", "hilo")]
        self._vectors = [r for r in manifest.states if r.layout in ("row", "hilo")]
        self.carried_names = {r.input: r.output for r in self._vectors if r.layout == "row"}
        """Input → the output that is this input in the next call."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._empty.values())

    def zeros(self) -> SequenceState:
        matrix = np.array([self._empty[record.name] for record in self._vectors], np.float32)
        carried = {name: matrix.copy() for name in self.carried_names}
        return SequenceState(self._pipeline.make_state(), carried)

    def canonical(self, row: SequenceState) -> State:
        state = {name: array.copy() for name, array in self._empty.items()}
        for record in self._matrices:
            state[record.name] = self._read(row, record)[:, : record.shape[1]]
        for index, record in enumerate(self._vectors):
            state[record.name] = self._read(row, record)[index, : record.shape[0]]
        return {name: array.astype(self._empty[name].dtype) for name, array in state.items()}

    def set(self, row: SequenceState, state: State) -> None:
        for record in self._matrices:
            self._write(row, record, state[record.name])
        if self._vectors:
            matrix = np.array([state[record.name] for record in self._vectors], np.float32)
            self._write(row, self._vectors[0], matrix)

    def _read(self, row: SequenceState, record: StateRecord) -> np.ndarray:
        """Returns the matrix of a state, or the one that has it as a row, with padding."""
        if record.layout == "row":
            return row.carried[record.input]
        hi = self._pipeline.read_state(row.in_runner, record.input)[0, 0]
        if record.layout == "canonical":
            return hi
        lo = self._pipeline.read_state(row.in_runner, record.output)[0, 0]
        return np.asarray(hi.astype(np.float32) + lo.astype(np.float32) / _LO_SCALE)

    def _write(self, row: SequenceState, record: StateRecord, matrix: np.ndarray) -> None:
        if record.layout == "row":
            row.carried = {record.input: matrix.copy()}
            return
        hi = matrix.astype(np.float16)
        self._store(row, record.input, hi)
        if record.layout != "canonical":
            lo = (matrix.astype(np.float32) - hi.astype(np.float32)) * _LO_SCALE
            self._store(row, record.output, lo.astype(np.float16))

    def _store(self, row: SequenceState, name: str, matrix: np.ndarray) -> None:
        stored = np.zeros_like(self._pipeline.read_state(row.in_runner, name))
        stored[0, 0, :, : matrix.shape[1]] = matrix
        self._pipeline.write_state(row.in_runner, name, stored)


class CoreMLSession(Session):
    """A package. Its functions take one sequence, so the rows of a batch are run in turn."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        runners: Mapping[str, Runner] | None = None,
    ):
        """Opens the packages; `runners` execute them instead of this machine's own."""
        assert isinstance(artifact.manifest, interface.CoreMLManifest)
        self._manifest, self._threads = artifact.manifest, usable_threads(threads)
        self._opened_files = [UnchangedFiles(artifact, p.name) for p in artifact.manifest.packages]
        self._runners = runners or {
            plan.name: _open_runner(artifact.file(plan.name), plan.functions)
            for plan in artifact.manifest.packages
        }
        self._pipeline = Pipeline(artifact.manifest, self._runners)
        self._chunk = artifact.manifest.coreml.prefill_length
        self.vocab_size = artifact.manifest.config.vocab_size
        self._states = StateConverter(artifact.manifest, self._pipeline)
        self.reset()

    @property
    def info(self) -> SessionInfo:
        tensors, runner = self._manifest.tensors.values(), next(iter(self._runners.values()))
        return SessionInfo(
            engine=runner.engine,
            engine_version=runner.version,
            threads=self._threads,
            activation_dtype=ACTIVATIONS[self._manifest.compute],
            weight_bytes=sum(p.nbytes for t in tensors for p in t.parts.values()),
            state_bytes=self._states.nbytes,
            prefill_chunk=self._chunk,
            chunk_logits=self._manifest.coreml.all_logits,
            whole_chunks=True,
        )

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._states.shapes

    @property
    def position(self) -> np.ndarray:
        return np.array([row.position for row in self._rows], np.int64)

    def reset(self, batch: int = 1) -> None:
        self.require_unchanged()
        self._rows = [self._states.zeros() for _ in range(batch)]

    def get_rows(self, rows: range) -> State:
        states = [self._states.canonical(self._rows[index]) for index in rows]
        state = {name: np.stack([row[name] for row in states]) for name in self._states.shapes}
        return state | {POSITION: self.position[rows.start : rows.stop]}

    def watch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Takes tokens [T] of the first row, a chunk or one, in one call; returns all outputs."""
        return self._run(self._rows[0], ids)

    def close(self) -> None:
        del self._rows, self._states, self._pipeline, self._runners

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        first = tokens.shape[1] - num_logits
        pairs = zip(rows, tokens, strict=True)
        return np.stack([self._take_row(self._rows[index], ids, first) for index, ids in pairs])

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        for source, index in enumerate(rows):
            row = self._rows[index] = self._states.zeros()
            row.position = int(state[POSITION][source])
            self._states.set(row, {name: state[name][source] for name in self._states.shapes})

    def _take_row(self, row: SequenceState, ids: np.ndarray, first: int) -> np.ndarray:
        """Takes tokens [T] of one sequence; returns logits [T - first, vocab] from `first` on."""
        logits = np.empty((len(ids) - first, self.vocab_size), np.float32)
        start = 0
        while start < len(ids):
            # Tokens whose logits `prefill` does not give go through `decode`.
            prefills = self._manifest.coreml.all_logits or start + self._chunk <= first + 1
            chunk = self._chunk if prefills and start + self._chunk <= len(ids) else 1
            stop = start + chunk
            result = self._run(row, ids[start:stop])["logits"][0]
            count = stop - max(first, start)
            if count > 0:
                logits[stop - first - count : stop - first] = result[-count:]
            start = stop
        return logits

    def _run(self, row: SequenceState, ids: np.ndarray) -> dict[str, np.ndarray]:
        function = PREFILL if len(ids) > 1 else DECODE
        positions = np.arange(row.position, row.position + len(ids), dtype=np.int32)
        inputs = {"input_ids": ids[None].astype(np.int32), "position_ids": positions[None]}
        outputs = self._pipeline.predict(function, inputs | row.carried, row.in_runner)
        row.carried = {name: outputs[after] for name, after in self._states.carried_names.items()}
        row.position += len(ids)
        return outputs
