"""ONNX Runtime behind the Session interface; states are bound once and updated in place."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import ACTIVATIONS
from rgexport.artifacts.onnx import model_file
from rgexport.griffin.state import POSITION, State
from rgexport.parallelism import usable_threads
from rgexport.runtimes.huge_pages import zeros_together
from rgexport.runtimes.onnx.bound_run import BoundRun
from rgexport.runtimes.onnx.loading import load_model
from rgexport.runtimes.onnx.verification import VerificationRun
from rgexport.runtimes.session import (
    Session,
    SessionInfo,
    UnchangedFiles,
    checked_tokens,
    stored_bytes,
)

PREFILL_CHUNK = 512
"""Tokens per run of a long prompt: enough to keep the cores busy, little scratch memory."""


class _Step(NamedTuple):
    """A run of one token of each row, [R, 1]; the arrays are bound to it."""

    ids: np.ndarray
    positions: np.ndarray
    run: BoundRun


class OrtSession(Session):
    """An ONNX artifact in ONNX Runtime on the CPU, with our kernels where they are built.

    Each state has one buffer, bound as input and as output: the graph reads a state before it
    writes it (the exporter asserts that). Keys and values are rings, so a step copies none of them.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        graph: bytes | None = None,
        native: bool = True,
    ):
        """Opens the model, or `graph` with its weights; our kernels may run if `native`."""
        self._manifest = artifact.manifest
        self._threads = usable_threads(threads)
        self._opened_files = (UnchangedFiles(artifact, model_file.MODEL_FILE),)

        model = load_model(artifact, self._threads, graph, native)
        self._session = model.session
        self._native = model.native
        self._weights = model.weights
        self._exact_tokens = model.exact_tokens
        self._sites = model.sites
        # A session that is dropped without `close` must stop it too, before its memory is freed.
        self._stop_advice = weakref.finalize(self, model.stop)

        self.vocab_size = artifact.manifest.config.vocab_size
        self._rings = {s.name: s.shape for s in self._manifest.states if s.layout == "ring"}
        """Keys and values → their shape in the graph, without the batch axis."""
        self.reset()

    @property
    def info(self) -> SessionInfo:
        """Facts about the session, for reports."""
        all_states = sum(array.nbytes for array in self._states.values())
        return SessionInfo(
            engine="onnxruntime",
            engine_version=ort.__version__,
            threads=self._threads,
            activation_dtype=ACTIVATIONS[self._manifest.compute],
            weight_bytes=stored_bytes(self._manifest),
            state_bytes=all_states // len(self._position),
            prefill_chunk=PREFILL_CHUNK,
            kernels=self._native.kernels,
            exact_tokens=self._exact_tokens,
        )

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape without the batch axis of each canonical state but the position."""
        shapes = {}
        for record in self._manifest.states:
            shapes[record.name] = record.shape
            if record.layout == "ring":
                # In the graph, keys and values have an axis for their one head too.
                shapes[record.name] = record.shape[-2:]
        return shapes

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        return self._position.copy()

    def watch(self, tokens: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Takes tokens [B, T] in one run with all logits; returns the outputs `names`."""
        rows = self._all
        ids = checked_tokens(tokens, len(self._position), self.vocab_size)
        run = self._bind(rows, ids, self._next_positions(rows, ids), ids.shape[1])
        outputs = run.fetch(names)
        self._position += ids.shape[1]
        return outputs

    def prefill_at_once(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [B, T] in one run; returns logits [B, num_logits, vocab]."""
        ids = checked_tokens(tokens, len(self._position), self.vocab_size)
        return self._run(self._all, ids, max(1, min(num_logits, ids.shape[1])))

    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations; raises as `Session.reset`."""
        self.require_unchanged()
        specs = {}
        for record in self._manifest.states:
            specs[record.name] = ((batch, *record.shape), record.dtype)
        self._states = zeros_together(specs)
        self._position = np.zeros(batch, np.int64)
        self._steps: dict[range, _Step] = {}
        self._trials: dict[tuple[range, int], VerificationRun] = {}

    def get_rows(self, rows: range) -> State:
        """Returns a copy of the canonical state of some rows."""
        span = slice(rows.start, rows.stop)
        position = self._position[span].copy()
        state = {name: array[span].copy() for name, array in self._states.items()}
        for name, shape in self._rings.items():
            ring = state[name].reshape(len(rows), *shape[-2:])
            state[name] = _rolled(ring, -position)
        state[POSITION] = position
        return state

    def close(self) -> None:
        """Frees the artifact's files and memory; the session cannot be used any more."""
        self._stop_advice()
        del self._steps, self._trials, self._session, self._weights
        self._states = {}

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        if tokens.shape[1] > 1:
            return self._take_chunks(rows, tokens, num_logits)
        if rows not in self._steps:
            self._steps[rows] = self._bind_step(rows)
        ids, positions, run = self._steps[rows]
        ids[:] = tokens
        positions[:] = self._next_positions(rows, tokens)
        return self._logits(rows, run, 1, 1)

    def _bind_step(self, rows: range) -> _Step:
        shape = (len(rows), 1)
        ids = np.zeros(shape, np.int64)
        positions = np.zeros(shape, np.int64)
        return _Step(ids, positions, self._bind(rows, ids, positions, 1))

    def _take_chunks(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        """Takes tokens [R, T] in chunks; returns the last logits, [R, num_logits, vocab]."""
        first_logits = tokens.shape[1] - num_logits
        logits = []
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            stop = start + chunk.shape[1]
            count = stop - max(first_logits, start)
            # The graph gives logits of at least one token; before `first_logits` they are dropped.
            result = self._run(rows, chunk, max(1, count))
            if count > 0:
                logits.append(result)
        if len(logits) == 1:
            return logits[0]
        return np.concatenate(logits, axis=1)

    def _verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        key = (rows, tokens.shape[1])
        if key not in self._trials:
            self._trials[key] = self._bind_trial(rows, tokens.shape[1])
        logits = np.empty((*tokens.shape, self.vocab_size), np.float32)
        self._trials[key].run(tokens, self._next_positions(rows, tokens), logits)
        return logits

    def _bind_trial(self, rows: range, length: int) -> VerificationRun:
        """Returns a run of `length` tokens of each row on trial."""
        shape = (len(rows), length)
        ids = np.zeros(shape, np.int64)
        positions = np.zeros(shape, np.int64)
        run = self._bind(rows, ids, positions, length)
        states = {name: array[rows.start : rows.stop] for name, array in self._states.items()}
        return VerificationRun(run, ids, positions, states, self._manifest.states, self._sites)

    def _accept(self, rows: range, tokens: np.ndarray, counts: Sequence[int]) -> None:
        self._trials[rows, tokens.shape[1]].accept(counts)
        self._position[rows.start : rows.stop] += np.array(counts)

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        span = slice(rows.start, rows.stop)
        position = state[POSITION]
        self._position[span] = position
        for name, buffer in self._states.items():
            array = state[name]
            if name in self._rings:
                array = _rolled(array, position).reshape(-1, *self._rings[name])
            buffer[span] = array

    def _run(self, rows: range, ids: np.ndarray, num_logits: int) -> np.ndarray:
        """Takes tokens [R, T] in one run; returns the last logits, [R, num_logits, vocab]."""
        run = self._bind(rows, ids, self._next_positions(rows, ids), num_logits)
        return self._logits(rows, run, ids.shape[1], num_logits)

    def _logits(self, rows: range, run: BoundRun, tokens: int, count: int) -> np.ndarray:
        """Runs a graph with `tokens` bound for each row; returns logits [R, count, vocab]."""
        logits = np.empty((len(rows), count, self.vocab_size), np.float32)
        run.bind(logits, None, "logits")
        run.run()
        self._position[rows.start : rows.stop] += tokens
        return logits

    def _next_positions(self, rows: range, ids: np.ndarray) -> np.ndarray:
        """Returns the positions of the rows' next tokens, shaped as `ids` [R, T]."""
        return np.asarray(self._position[rows.start : rows.stop, None] + np.arange(ids.shape[1]))

    def _bind(
        self, rows: range, ids: np.ndarray, positions: np.ndarray, num_logits: int
    ) -> BoundRun:
        """Returns a run of tokens [R, T] with everything bound but the logits."""
        run = BoundRun(self._session)
        run.bind(np.ascontiguousarray(ids), "input_ids")
        run.bind(positions, "position_ids")
        run.bind(np.array(num_logits), model_file.NUM_LOGITS)
        for record in self._manifest.states:
            state = self._states[record.name][rows.start : rows.stop]
            run.bind(state, record.input, record.output)
        self._bind_site_outputs(run, ids.shape)
        return run

    def _bind_site_outputs(self, run: BoundRun, shape: tuple[int, ...]) -> None:
        """Binds the outputs that only verification reads, for tokens of a shape [R, T].

        They share an array for all layers, as ONNX Runtime would keep them all. A layer overwrites
        what the next has read already.
        """
        arrays: dict[str, np.ndarray] = {}
        for name, site in self._sites.items():
            kind = name.rpartition(".")[2]
            if kind not in arrays:
                width = self._states[name].shape[-1]
                arrays[kind] = np.empty((*shape, width), np.float32)
            run.bind(arrays[kind], None, site)


def _rolled(caches: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Rotates each row of caches [B, window, D]; position p is in slot p modulo window."""
    rolled = [np.roll(cache, shift, 0) for cache, shift in zip(caches, shifts, strict=True)]
    return np.stack(rolled)
