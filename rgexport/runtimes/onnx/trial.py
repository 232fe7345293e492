"""Tokens on trial: all get logits, and then the states keep as many of them as are right.

A recurrent state cannot be cut back. But the graph has its rows: h of each token is a state, and
what goes into a convolution becomes its state. So a trial leaves these states alone, and takes the
rows of the tokens that stay. Keys and values go into their rings as ever; the slots of tokens that
do not stay get back what they held.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rgexport.export.manifest import StateRecord
from rgexport.griffin.config import GriffinConfig
from rgexport.runtimes.onnx.run import Run


def state_sites(config: GriffinConfig) -> dict[str, str]:
    """Recurrent state → the site whose values [B, T, R] are its next rows."""
    recurrent = [i for i, kind in enumerate(config.block_types) if kind == "recurrent"]
    return {
        f"layers.{i}.{state}": f"layers.{i}.temporal_block.{site}"
        for i in recurrent
        for state, site in (("rg_lru", "rg_lru"), ("conv1d", "linear_x"))
    }


class Trial:
    """A run over T tokens of R rows, whose bindings are kept."""

    def __init__(
        self,
        run: Run,
        ids: np.ndarray,
        positions: np.ndarray,
        states: Mapping[str, np.ndarray],
        records: Sequence[StateRecord],
        sites: Mapping[str, str],
    ) -> None:
        """Binds the rows of the states.

        Args:
            run: has the states [R, …], ids and positions [R, T] bound, the states as outputs too.
            ids: what is filled in.
            positions: likewise.
            states: by name.
            records: of all states.
            sites: of the recurrent ones, see `state_sites`.
        """
        self._run, self._ids, self._positions = run, ids, positions
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._rings: list[np.ndarray] = []
        self._held: list[np.ndarray] = []
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
        self._held = [ring[rows, positions % ring.shape[1]] for ring in self._rings]
        self._run.bind(logits, None, "logits")
        self._run.run()

    def accept(self, counts: Sequence[int]) -> None:
        """Lets the states keep so many of each row's tokens."""
        for row, count in enumerate(counts):
            for state, rows in self._rows:
                state[row] = np.concatenate([state[row], rows[row, :count]])[count:]
            refused = self._positions[row, count:]
            for ring, held in zip(self._rings, self._held, strict=True):
                ring[row, refused % ring.shape[1]] = held[row, count:]
