"""Runs of a graph over buffers of our own, also of tokens on trial."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort

from rgexport.errors import RequestError, one_line
from rgexport.export.manifest import StateRecord
from rgexport.griffin.config import GriffinConfig


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

    A recurrent state cannot be cut back. But the graph has its rows: h of each token is a state,
    and the inputs of a convolution become its state. So the run leaves these states alone, and
    `accept` takes the rows of accepted tokens. Keys and values go into their rings; the slots of
    refused tokens get back their former content.
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
