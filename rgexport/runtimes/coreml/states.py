"""Canonical states as the features of a Core ML package carry them."""

import numpy as np

from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.coreml.states import LO_SCALE
from rgexport.export.manifest import ACTIVATIONS, StateRecord
from rgexport.griffin.state import State, state_specs
from rgexport.runtimes.coreml.runner import Runner

_LO_SCALE = np.float32(LO_SCALE)


class Row:
    """One conversation: what the runner holds of it, and what goes in and out of each call."""

    def __init__(self, states: "States"):
        self.position = 0
        self.state = states.runner.make_state()
        self.carried = states.zeros()


class States:
    """Canonical states of one sequence, as the features of a package carry them.

    The RG-LRU's of all layers are lines of one matrix, in the order of the manifest.
    """

    def __init__(self, manifest: CoreMLManifest, runner: Runner):
        self.runner = runner
        specs = state_specs(manifest.config, ACTIVATIONS[manifest.compute])
        self.shapes = {spec.name: spec.shape for spec in specs}
        self._empty = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}
        self._kept = [r for r in manifest.states if r.layout not in ("row", "hilo")]
        self._lines = [r for r in manifest.states if r.layout in ("row", "hilo")]
        self.carried_names = {r.input: r.output for r in self._lines if r.layout == "row"}
        """Input → output that is the same input of the next call."""

    @property
    def nbytes(self) -> int:
        """Bytes of the state of one sequence, without padding."""
        return sum(array.nbytes for array in self._empty.values())

    def zeros(self) -> dict[str, np.ndarray]:
        """What the first call is given."""
        matrix = np.array([self._empty[record.name] for record in self._lines], np.float32)
        return {name: matrix.copy() for name in self.carried_names}

    def canonical(self, row: Row) -> State:
        """The states of a conversation by their canonical names."""
        state = {name: array.copy() for name, array in self._empty.items()}
        for record in self._kept:
            state[record.name] = self._read(row, record)[:, : record.shape[1]]
        for index, record in enumerate(self._lines):
            state[record.name] = self._read(row, record)[index, : record.shape[0]]
        return {name: array.astype(self._empty[name].dtype) for name, array in state.items()}

    def set(self, row: Row, state: State) -> None:
        """Puts canonical states, without a batch axis, in their places."""
        for record in self._kept:
            self._write(row, record, state[record.name])
        if self._lines:
            matrix = np.array([state[record.name] for record in self._lines], np.float32)
            self._write(row, self._lines[0], matrix)

    def _read(self, row: Row, record: StateRecord) -> np.ndarray:
        """The matrix that a state is, or is a line of, with its padding."""
        if record.layout == "row":
            return row.carried[record.input]
        hi = self.runner.read_state(row.state, record.input)[0, 0]
        if record.layout == "canonical":
            return hi
        lo = self.runner.read_state(row.state, record.output)[0, 0]
        whole: np.ndarray = hi.astype(np.float32) + lo.astype(np.float32) / _LO_SCALE
        return whole

    def _write(self, row: Row, record: StateRecord, matrix: np.ndarray) -> None:
        """The inverse of `_read`, of a matrix without padding."""
        if record.layout == "row":
            row.carried = {record.input: matrix.copy()}
            return
        hi = matrix.astype(np.float16)
        self._store(row, record.input, hi)
        if record.layout != "canonical":
            rest = (matrix.astype(np.float32) - hi.astype(np.float32)) * _LO_SCALE
            self._store(row, record.output, rest.astype(np.float16))

    def _store(self, row: Row, name: str, matrix: np.ndarray) -> None:
        """Fills a float16 state [1, 1, n, padded width] with [n, width]."""
        stored = np.zeros_like(self.runner.read_state(row.state, name))
        stored[0, 0, :, : matrix.shape[1]] = matrix
        self.runner.write_state(row.state, name, stored)
