"""A checkpoint behind the Session interface: the float32 reference in NumPy."""

import numpy as np

from rgexport._version import __version__
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import POSITION, State, state_specs, zero_state
from rgexport.parallelism import job_count, usable_threads
from rgexport.runtimes.machine import available_bytes
from rgexport.runtimes.session import Session, SessionInfo

_SPARE_BYTES = 2 << 30  # memory beside the weights, if all of them are kept
_FLOAT32_BYTES = 4


class ReferenceSession(Session):
    """The original model; its weights stay in memory if they fit, else each pass reads them."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int | None = None):
        shapes = [tensor.shape for tensor in checkpoint.weights.values()]
        self._bytes = sum(_FLOAT32_BYTES * int(np.prod(shape)) for shape in shapes)
        available = available_bytes()
        keep = available is None or self._bytes + _SPARE_BYTES <= available
        self._config = checkpoint.config
        self.vocab_size = checkpoint.config.vocab_size
        self._reference = NumpyReference(checkpoint.config, checkpoint.weights, keep=keep)
        self._threads = usable_threads(threads)
        self.reset()

    @property
    def info(self) -> SessionInfo:
        """Facts about the reference, which computes in float32."""
        shapes = self.state_shapes.values()
        state_bytes = sum(_FLOAT32_BYTES * int(np.prod(shape)) for shape in shapes)
        return SessionInfo(
            engine=f"rgexport {__version__} reference, NumPy",
            engine_version=np.__version__,
            threads=self._threads,
            activation_dtype="float32",
            weight_bytes=self._bytes,
            state_bytes=state_bytes,
            prefill_chunk=512,
        )

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each array of one sequence's state, without the batch axis."""
        return {spec.name: spec.shape for spec in state_specs(self._config)}

    @property
    def position(self) -> np.ndarray:
        """Tokens that each row has seen, int64 [B]."""
        return self._state[POSITION].copy()

    def reset(self, batch: int = 1) -> None:
        """Starts `batch` empty sequences."""
        self._state = zero_state(self._config, batch)

    def get_rows(self, rows: range) -> State:
        """Returns a copy of the state of some rows."""
        return {name: array[rows.start : rows.stop].copy() for name, array in self._state.items()}

    def close(self) -> None:
        """Does nothing: the session holds no resource."""

    def _set_rows(self, rows: range, state: State) -> None:
        for name, array in self._state.items():
            array[rows.start : rows.stop] = state[name]

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        # Checkpoints with huge weights may overflow; the caller checks the logits.
        with job_count(self._threads), np.errstate(over="ignore", invalid="ignore"):
            hidden, after = self._reference.run(tokens, self.get_rows(rows))
            self._set_rows(rows, after)
            return self._reference.logits(hidden[:, -num_logits:])
