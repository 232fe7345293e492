"""Core ML packages behind the Session interface: Core ML on macOS, an interpreter elsewhere."""

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import LO_SCALE, CoreMLManifest
from rgexport.export.coreml.package import DECODE, PREFILL
from rgexport.export.manifest import ACTIVATIONS, StateRecord
from rgexport.griffin.state import POSITION, State, state_specs
from rgexport.parallelism import usable_threads
from rgexport.runtimes.coreml.runner import Runner, open_runner
from rgexport.runtimes.session import Session, SessionInfo, UnchangedFiles

_LO_SCALE = np.float32(LO_SCALE)


class SequenceState:
    """The state of a sequence: in the runner, and as inputs and outputs of each call."""

    def __init__(self, converter: "StateConverter"):
        self.position = 0
        self.in_runner = converter.runner.make_state()
        self.carried = converter.zeros()


class StateConverter:
    """Converts the canonical states of a sequence to the features of a package, and back.

    The RG-LRU states of all layers are the rows of one matrix, in the order of the manifest.
    """

    def __init__(self, manifest: CoreMLManifest, runner: Runner):
        self.runner = runner
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

    def zeros(self) -> dict[str, np.ndarray]:
        """Returns the carried inputs of the first call."""
        matrix = np.array([self._empty[record.name] for record in self._vectors], np.float32)
        return {name: matrix.copy() for name in self.carried_names}

    def canonical(self, row: SequenceState) -> State:
        """Returns the states of a sequence by their canonical names."""
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
        hi = self.runner.read_state(row.in_runner, record.input)[0, 0]
        if record.layout == "canonical":
            return hi
        lo = self.runner.read_state(row.in_runner, record.output)[0, 0]
        matrix: np.ndarray = hi.astype(np.float32) + lo.astype(np.float32) / _LO_SCALE
        return matrix

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
        """Fills a float16 state [1, 1, n, padded width] with [n, width]."""
        stored = np.zeros_like(self.runner.read_state(row.in_runner, name))
        stored[0, 0, :, : matrix.shape[1]] = matrix
        self.runner.write_state(row.in_runner, name, stored)


class CoreMLSession(Session):
    """A package with the functions `decode`, of one token, and `prefill`, of a fixed number.

    Both take one sequence, so the rows of a batch are run in turn, each with its own state.
    """

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, runner: Runner | None = None
    ):
        """Opens the package.

        Args:
            artifact: a Core ML artifact.
            threads: only reported; Core ML and numpy choose their own.
            runner: executes the package, instead of this machine's own runner.

        Raises:
            RequestError: the package cannot be executed here.
        """
        assert isinstance(artifact.manifest, CoreMLManifest)
        self._manifest = artifact.manifest
        self._threads = usable_threads(threads)
        self._opened_files = [UnchangedFiles(artifact, p.name) for p in artifact.manifest.packages]
        self._runner = runner or open_runner(artifact.path, artifact.manifest)
        self._chunk = artifact.manifest.coreml.prefill_length
        self._vocab = artifact.manifest.config.vocab_size
        self._states = StateConverter(artifact.manifest, self._runner)
        self.reset()

    @property
    def info(self) -> SessionInfo:
        tensors = self._manifest.tensors.values()
        return SessionInfo(
            engine=self._runner.engine,
            engine_version=self._runner.version,
            threads=self._threads,
            activation_dtype=ACTIVATIONS[self._manifest.compute],
            weight_bytes=sum(p.nbytes for t in tensors for p in t.parts.values()),
            state_bytes=self._states.nbytes,
            prefill_chunk=self._chunk,
            chunk_logits=self._manifest.coreml.all_logits,
            whole_chunks=True,
        )

    @property
    def vocab_size(self) -> int:
        return self._vocab

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._states.shapes

    @property
    def position(self) -> np.ndarray:
        return np.array([row.position for row in self._rows], np.int64)

    def reset(self, batch: int = 1) -> None:
        self.require_unchanged()
        self._rows = [SequenceState(self._states) for _ in range(batch)]

    def get_rows(self, rows: range) -> State:
        states = [self._states.canonical(self._rows[index]) for index in rows]
        state = {name: np.stack([row[name] for row in states]) for name in self._states.shapes}
        return state | {POSITION: self.position[rows.start : rows.stop]}

    def close(self) -> None:
        del self._rows, self._states, self._runner

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        first = tokens.shape[1] - num_logits
        pairs = zip(rows, tokens, strict=True)
        return np.stack([self._take_row(self._rows[index], ids, first) for index, ids in pairs])

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        for source, index in enumerate(rows):
            row = self._rows[index] = SequenceState(self._states)
            row.position = int(state[POSITION][source])
            self._states.set(row, {name: state[name][source] for name in self._states.shapes})

    def _take_row(self, row: SequenceState, ids: np.ndarray, first: int) -> np.ndarray:
        """Takes tokens [T] of one sequence; returns logits [T - first, vocab] from `first` on.

        Whole chunks go through `prefill`, the rest through `decode`, as do all tokens whose logits
        `prefill` does not give.
        """
        logits = np.empty((len(ids) - first, self._vocab), np.float32)
        start = 0
        while start < len(ids):
            prefills = self._manifest.coreml.all_logits or start + self._chunk <= first + 1
            chunk = self._chunk if prefills and start + self._chunk <= len(ids) else 1
            stop = start + chunk
            result = self._run(row, PREFILL if chunk > 1 else DECODE, ids[start:stop])
            count = stop - max(first, start)
            if count > 0:
                logits[stop - first - count : stop - first] = result[-count:]
            start = stop
        return logits

    def _run(self, row: SequenceState, function: str, ids: np.ndarray) -> np.ndarray:
        positions = np.arange(row.position, row.position + len(ids), dtype=np.int32)
        inputs = {"input_ids": ids[None].astype(np.int32), "position_ids": positions[None]}
        outputs = self._runner.predict(function, inputs | row.carried, row.in_runner)
        row.carried = {
            source: outputs[target] for source, target in self._states.carried_names.items()
        }
        row.position += len(ids)
        return outputs["logits"][0]
