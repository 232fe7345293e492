"""ONNX Runtime behind the Session interface; states are bound once and updated in place."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import onnxruntime as ort

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import ACTIVATIONS, Manifest, StateRecord
from rgexport.artifacts.onnx import model_file
from rgexport.artifacts.onnx.trust import require_trusted
from rgexport.errors import RequestError, one_line
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import POSITION, State
from rgexport.parallelism import usable_threads
from rgexport.progress import warn
from rgexport.runtimes.huge_pages import huge_pages, zeros_together
from rgexport.runtimes.onnx.mapped_weights import MappedWeights
from rgexport.runtimes.session import Session, SessionInfo, UnchangedFiles, checked_tokens

PREFILL_CHUNK = 512
"""Tokens per run of a long prompt: enough to keep the cores busy, little scratch memory."""

_SILENT = 4  # severity of the log: errors are raised, and lines show names unescaped
_WEBGPU = 1, 25  # the first ONNX Runtime with all ops of that profile on a CPU
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Option of ONNX Runtime: the folder of the weights of a graph that is loaded from memory."""


@contextmanager
def engine_errors(action: str) -> Iterator[None]:
    """Turns the errors of ONNX Runtime, which have no common base, into one line."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        raise RequestError(f"ONNX Runtime {ort.__version__} cannot {action}: {reason}") from None


class BoundRun:
    """A graph with inputs and outputs bound to arrays; ONNX Runtime may keep only pointers."""

    def __init__(self, session: ort.InferenceSession):
        self._session, self._binding = session, session.io_binding()
        self._arrays: dict[str | None, np.ndarray] = {}

    def bind(self, array: np.ndarray, source: str | None, target: str | None = None) -> None:
        """Binds `array` as the input `source` and the output `target`, instead of earlier ones."""
        self._arrays[source or target] = array
        with engine_errors(f"bind {source or target}"):
            value = ort.OrtValue.ortvalue_from_numpy(array)
            if source:
                self._binding.bind_ortvalue_input(source, value)
            if target:
                self._binding.bind_ortvalue_output(target, value)

    def run(self) -> None:
        with engine_errors("run the model"):
            self._session.run_with_iobinding(self._binding)

    def fetch(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        for name in names:
            self._binding.bind_output(name)
        self.run()
        outputs = self._binding.get_outputs()[-len(names) :]
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}


def state_sites(config: GriffinConfig) -> dict[str, str]:
    """Returns recurrent state → the site that computes its next rows, [B, T, R]."""
    recurrent = [i for i, kind in enumerate(config.block_types) if kind == "recurrent"]
    return {
        f"layers.{i}.{state}": f"layers.{i}.temporal_block.{site}"
        for i in recurrent
        for state, site in (("rg_lru", "rg_lru"), ("conv1d", "linear_x"))
    }


class VerificationRun:
    """A run over T tokens of R rows on trial; then the states keep the accepted tokens.

    The graph has the rows of recurrent states: h of each token, and the inputs of a convolution. So
    the run leaves these states alone, and `accept` takes the rows of accepted tokens. Keys and
    values go into their rings; the slots of refused tokens get back their former content.
    """

    def __init__(
        self,
        run: BoundRun,
        ids: np.ndarray,
        positions: np.ndarray,
        states: Mapping[str, np.ndarray],
        records: Sequence[StateRecord],
        sites: Mapping[str, str],
    ) -> None:
        """Binds the states' rows; `run` has states, ids and positions [R, T] bound."""
        self._run, self._ids, self._positions = run, ids, positions
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._rings: list[np.ndarray] = []
        self._former: list[np.ndarray] = []
        for record in records:
            state = states[record.name]
            if record.layout == "ring":
                self._rings.append(state.reshape(len(ids), *record.shape[-2:]))
                continue
            rows = np.empty((*ids.shape, state.shape[-1]), state.dtype)
            run.bind(np.empty_like(state), None, record.output)
            run.bind(rows, None, sites[record.name])
            # h and its state [R, W] are as the inputs of a convolution of two taps.
            self._rows.append((state.reshape(len(ids), -1, state.shape[-1]), rows))

    def run(self, ids: np.ndarray, positions: np.ndarray, logits: np.ndarray) -> None:
        """Runs tokens [R, T] at their positions; fills logits [R, T, vocab]."""
        self._ids[:], self._positions[:] = ids, positions
        rows = np.arange(len(ids))[:, None]
        self._former = [ring[rows, positions % ring.shape[1]] for ring in self._rings]
        self._run.bind(logits, None, "logits")
        self._run.run()

    def accept(self, counts: Sequence[int]) -> None:
        for row, count in enumerate(counts):
            for state, rows in self._rows:
                state[row] = np.concatenate([state[row], rows[row, :count]])[count:]
            refused = self._positions[row, count:]
            for ring, former in zip(self._rings, self._former, strict=True):
                ring[row, refused % ring.shape[1]] = former[row, count:]


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
        opened = _open(artifact, self._threads, graph, native)
        self._session, self._native, self._weights, stop = opened
        # A session that is dropped without `close` must stop it too, before its memory is freed.
        self._stop_advice = weakref.finalize(self, stop)
        self._exact = 1 if graph else _exact_tokens(self._native, self._manifest)
        self._sites = state_sites(self._manifest.config) if self._exact > 1 else {}
        if not {value.name for value in self._session.get_outputs()} >= {*self._sites.values()}:
            self._exact, self._sites = 1, {}
        self.vocab_size = artifact.manifest.config.vocab_size
        self._rings = {s.name: s.shape for s in self._manifest.states if s.layout == "ring"}
        self.reset()

    @property
    def info(self) -> SessionInfo:
        tensors = self._manifest.tensors.values()
        return SessionInfo(
            engine="onnxruntime",
            engine_version=ort.__version__,
            threads=self._threads,
            activation_dtype=ACTIVATIONS[self._manifest.compute],
            weight_bytes=sum(p.nbytes for t in tensors for p in t.parts.values()),
            state_bytes=sum(a.nbytes for a in self._states.values()) // len(self._position),
            prefill_chunk=PREFILL_CHUNK,
            kernels=self._native.kernels,
            exact_tokens=self._exact,
        )

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        # In the graph, keys and values have an axis for their one head too.
        states = self._manifest.states
        return {s.name: s.shape[-2:] if s.layout == "ring" else s.shape for s in states}

    @property
    def position(self) -> np.ndarray:
        return self._position.copy()

    def watch(self, tokens: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Takes tokens [B, T] in one run with all logits; returns the outputs `names`."""
        ids, rows = checked_tokens(tokens, len(self._position), self.vocab_size), self._all
        outputs = self._bind(rows, ids, self._next(rows, ids), ids.shape[1]).fetch(names)
        self._position += ids.shape[1]
        return outputs

    def prefill_at_once(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        ids = checked_tokens(tokens, len(self._position), self.vocab_size)
        return self._run(self._all, ids, max(1, min(num_logits, ids.shape[1])))

    def reset(self, batch: int = 1) -> None:
        self.require_unchanged()
        specs = self._manifest.states
        self._states = zeros_together({s.name: ((batch, *s.shape), s.dtype) for s in specs})
        self._position = np.zeros(batch, np.int64)
        self._steps: dict[range, tuple[np.ndarray, np.ndarray, BoundRun]] = {}
        self._trials: dict[tuple[range, int], VerificationRun] = {}

    def get_rows(self, rows: range) -> State:
        span = slice(rows.start, rows.stop)
        position = self._position[span].copy()
        state = {name: array[span].copy() for name, array in self._states.items()}
        for name, shape in self._rings.items():
            state[name] = _rolled(state[name].reshape(len(rows), *shape[-2:]), -position)
        return state | {POSITION: position}

    def close(self) -> None:
        self._stop_advice()
        del self._steps, self._trials, self._session, self._weights
        self._states = {}

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        if tokens.shape[1] == 1:
            if rows not in self._steps:
                ids, positions = np.zeros((2, *tokens.shape), np.int64)
                self._steps[rows] = ids, positions, self._bind(rows, ids, positions, 1)
            ids, positions, run = self._steps[rows]
            ids[:], positions[:] = tokens, self._next(rows, tokens)
            return self._logits(rows, run, 1, 1)
        first = tokens.shape[1] - num_logits
        logits = []
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            count = start + chunk.shape[1] - max(first, start)
            result = self._run(rows, chunk, max(1, count))
            if count > 0:
                logits.append(result)
        return np.concatenate(logits, axis=1) if len(logits) > 1 else logits[0]

    def _verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        key = rows, tokens.shape[1]
        if key not in self._trials:
            ids, positions = np.zeros((2, *tokens.shape), np.int64)
            run, specs = self._bind(rows, ids, positions, tokens.shape[1]), self._manifest.states
            states = {s.name: self._states[s.name][rows.start : rows.stop] for s in specs}
            self._trials[key] = VerificationRun(run, ids, positions, states, specs, self._sites)
        logits = np.empty((*tokens.shape, self.vocab_size), np.float32)
        self._trials[key].run(tokens, self._next(rows, tokens), logits)
        return logits

    def _accept(self, rows: range, tokens: np.ndarray, counts: Sequence[int]) -> None:
        self._trials[rows, tokens.shape[1]].accept(counts)
        self._position[rows.start : rows.stop] += np.array(counts)

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        span = slice(rows.start, rows.stop)
        self._position[span] = position = state[POSITION]
        for name, buffer in self._states.items():
            array = state[name]
            if name in self._rings:
                array = _rolled(array, position).reshape(-1, *self._rings[name])
            buffer[span] = array

    def _run(self, rows: range, ids: np.ndarray, num_logits: int) -> np.ndarray:
        run = self._bind(rows, ids, self._next(rows, ids), num_logits)
        return self._logits(rows, run, ids.shape[1], num_logits)

    def _logits(self, rows: range, run: BoundRun, tokens: int, count: int) -> np.ndarray:
        logits = np.empty((len(rows), count, self.vocab_size), np.float32)
        run.bind(logits, None, "logits")
        run.run()
        self._position[rows.start : rows.stop] += tokens
        return logits

    def _next(self, rows: range, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self._position[rows.start : rows.stop, None] + np.arange(ids.shape[1]))

    def _bind(
        self, rows: range, ids: np.ndarray, positions: np.ndarray, num_logits: int
    ) -> BoundRun:
        run = BoundRun(self._session)
        run.bind(np.ascontiguousarray(ids), "input_ids")
        run.bind(positions, "position_ids")
        run.bind(np.array(num_logits), model_file.NUM_LOGITS)
        for record in self._manifest.states:
            run.bind(self._states[record.name][rows.start : rows.stop], record.input, record.output)
        # Outputs that only verification reads share an array for all layers, as ONNX Runtime would
        # keep them all. A layer overwrites what the next has read already.
        arrays: dict[str, np.ndarray] = {}
        for name, site in self._sites.items():
            kind, width = name.rpartition(".")[2], self._states[name].shape[-1]
            if kind not in arrays:
                arrays[kind] = np.empty((*ids.shape, width), np.float32)
            run.bind(arrays[kind], None, site)
        return run


def _exact_tokens(native: model_file.NativeOps, manifest: Manifest) -> int:
    """Returns `SessionInfo.exact_tokens`.

    ONNX Runtime takes cosines and sines four at a time, and the remainder by another formula. More
    tokens than the window has would share slots of a ring, which could not be restored.
    """
    config = manifest.config
    angles = config.rope_dims // 2 if "attention" in config.block_types else 0
    if angles % 4 or ACTIVATIONS[manifest.compute] != "float32":
        return 1
    return min(native.exact_tokens, config.window)


def _rolled(caches: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Rotates each row of caches [B, window, D]; position p is in slot p modulo window."""
    return np.stack([np.roll(c, s, axis=0) for c, s in zip(caches, shifts, strict=True)])


def _open(
    artifact: Artifact, threads: int, graph: bytes | None, native: bool
) -> tuple[ort.InferenceSession, model_file.NativeOps, MappedWeights | None, Callable[[], None]]:
    version = ort.__version__
    if artifact.manifest.profile == "webgpu" and tuple(map(int, version.split(".")[:2])) < _WEBGPU:
        raise RequestError(
            f"{artifact.path} is made for webgpu, and on a processor needs ONNX Runtime "
            f"{'.'.join(map(str, _WEBGPU))} or later; this is {version}: update onnxruntime"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _SILENT
    # A memory pattern takes a block for all tensors of a run, beside the arena of the first run:
    # 180 MB for prompts of a 2B, without a gain in time.
    options.enable_mem_pattern = False
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(artifact.path))
    path = artifact.file(model_file.MODEL_FILE)
    model, weights = graph or model_file.read_graph(path), None
    require_trusted(artifact, model)
    ops = _register(options, model_file.native_ops(model)) if native else model_file.NativeOps()
    exact = not graph and _exact_tokens(ops, artifact.manifest) > 1
    model = model_file.prepare_model(
        model, state_sites(artifact.manifest.config).values() if exact else ()
    )
    if ops.library:
        weights = MappedWeights(artifact.path, ops.weights)
        weights.read_around(ops.small)
        for name, value in weights.values.items():
            options.add_initializer(name, value)
    with engine_errors(f"open {path}"), huge_pages() as advice:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    stack = ExitStack()
    stack.callback(advice.stop)
    if weights:
        weights.make_resident()
        stack.callback(weights.close)
    return session, ops, weights, stack.close


def _register(options: ort.SessionOptions, native: model_file.NativeOps) -> model_file.NativeOps:
    try:
        if native.library:
            options.register_custom_ops_library(str(native.library))
    except Exception as error:  # built for another machine or another ONNX Runtime
        warn(f"it will be slower, for the native kernels cannot be loaded: {error}")
        return model_file.NativeOps()
    return native
