"""How far the residual stream behind each layer is from a reference file's."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.engine import open_observer
from rgexport.validate.reference.reference_file import ReferenceFile

STATE_BYTES = 256 << 20
"""The artifact's states before the positions that are looked at: 7 of a 2B, in float32."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The residual stream behind one layer: ‖Δ‖ / ‖reference‖ over some positions.

    All that came before has its share: the layer to blame is the first beyond its limit, or where
    the error has grown most. `worst_position` is where it is largest.
    """

    layer: int
    relative_rms: float
    worst_position: int
    limit: float

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.relative_rms <= self.limit


def positions_to_look_at(reference: ReferenceFile, state: State) -> tuple[int, ...]:
    """As many of the watched positions as there is room for states as large as this one."""
    size = sum(array.nbytes for array in state.values())
    watched = reference.header.watched
    count = min(len(watched), max(1, STATE_BYTES // size))
    places = np.linspace(0, len(watched) - 1, count).round().astype(int)
    return tuple(watched[place] for place in places.tolist())


def layer_errors(
    artifact: Artifact, reference: ReferenceFile, before: Mapping[int, State], limit: float
) -> list[LayerError]:
    """Looks into an artifact in its own engine, one token at each position.

    Args:
        artifact: whose session is gone: the model is loaded once more.
        reference: the file.
        before: position → the artifact's own canonical state before it; some of the watched ones.
        limit: of each layer's error.

    Raises:
        RequestError: something is missing that looking into the model takes.
    """
    observer = open_observer(artifact)
    deltas, sizes = [], []
    with task("Looking at the layers", len(before), "positions") as advance:
        for position, state in before.items():
            expected = reference.activations(reference.header.watched.index(position))
            token = reference.tokens[position : position + 1]
            values = observer.observe(token, state).values
            found = [values[f"layers.{i}.channel_residual"][-1] for i in range(len(expected))]
            with np.errstate(invalid="ignore", over="ignore"):
                delta = np.asarray(found, np.float64) - expected
                deltas.append(np.square(delta).sum(1))
            sizes.append(np.square(expected, dtype=np.float64).sum(1))
            advance(1)
    return _summaries(np.array(deltas), np.array(sizes), tuple(before), limit)


def _summaries(
    deltas: np.ndarray, sizes: np.ndarray, positions: tuple[int, ...], limit: float
) -> list[LayerError]:
    """Sums of squares [positions, layers] of the errors and of the reference, layer by layer."""
    shares = np.sqrt(deltas / np.where(sizes, sizes, 1))
    worst = np.nan_to_num(shares, nan=np.inf).argmax(0).tolist()
    totals = np.sqrt(deltas.sum(0) / np.where(sizes.sum(0), sizes.sum(0), 1)).tolist()
    return [
        LayerError(layer=i, relative_rms=total, worst_position=positions[place], limit=limit)
        for i, (total, place) in enumerate(zip(totals, worst, strict=True))
    ]
