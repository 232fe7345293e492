"""Takes tokens on trial: the states keep those that are accepted, and lose the others."""

from collections.abc import Mapping, Sequence

import numpy as np

from rgexport.artifacts.manifest import StateRecord
from rgexport.griffin.config import GriffinConfig
from rgexport.runtimes.onnx.bound_run import BoundRun


def state_sites(config: GriffinConfig) -> dict[str, str]:
    """Returns recurrent state → the site that computes its next rows, [B, T, R]."""
    sites = {}
    for index, kind in enumerate(config.block_types):
        if kind == "recurrent":
            block = f"layers.{index}.temporal_block"
            sites[f"layers.{index}.rg_lru"] = f"{block}.rg_lru"
            sites[f"layers.{index}.conv1d"] = f"{block}.linear_x"
    return sites


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
        self._run = run
        self._ids = ids
        self._positions = positions
        self._recurrent: list[tuple[np.ndarray, np.ndarray]] = []
        """Each recurrent state [R, taps - 1, W], and its rows of the run, [R, T, W]."""
        self._rings: list[np.ndarray] = []
        """Keys and values, [R, window, D]."""
        self._former: list[np.ndarray] = []
        """The slots of each ring before the run, [R, T, D]."""
        for record in records:
            state = states[record.name]
            if record.layout == "ring":
                self._rings.append(state.reshape(len(ids), *record.shape[-2:]))
                continue
            width = state.shape[-1]
            rows = np.empty((*ids.shape, width), state.dtype)
            run.bind(np.empty_like(state), None, record.output)
            run.bind(rows, None, sites[record.name])
            # h and its state [R, W] are as the inputs of a convolution of two taps.
            self._recurrent.append((state.reshape(len(ids), -1, width), rows))

    def run(self, ids: np.ndarray, positions: np.ndarray, logits: np.ndarray) -> None:
        """Runs tokens [R, T] at their positions; fills logits [R, T, vocab]."""
        self._ids[:] = ids
        self._positions[:] = positions
        rows = np.arange(len(ids))[:, None]
        self._former = [ring[rows, positions % ring.shape[1]] for ring in self._rings]
        self._run.bind(logits, None, "logits")
        self._run.run()

    def accept(self, counts: Sequence[int]) -> None:
        """Keeps the first `counts` tokens of each row of the last run in the states."""
        for row, count in enumerate(counts):
            for state, rows in self._recurrent:
                inputs = np.concatenate([state[row], rows[row, :count]])
                state[row] = inputs[count:]
            refused = self._positions[row, count:]
            for ring, former in zip(self._rings, self._former, strict=True):
                ring[row, refused % ring.shape[1]] = former[row, count:]
