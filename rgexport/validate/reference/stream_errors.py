"""The error of the residual stream after each layer, against a reference file."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.griffin.state import State
from rgexport.progress import task
from rgexport.runtimes.engine import open_observer
from rgexport.validate.reference.reference_file import ReferenceFile

STATE_BYTES = 256 << 20
"""Budget for the artifact's states before the compared positions: 7 of a 2B, in float32."""


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The residual stream after one layer: ‖Δ‖ / ‖reference‖ over some positions.

    It includes the errors of all layers before. So the layer to blame is the first beyond its
    limit, or the one where the error grows most. `worst_position` is where it is largest.
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
    """As many of the watched positions as have room for a state of this size each."""
    size = sum(array.nbytes for array in state.values())
    watched = reference.header.watched
    count = min(len(watched), max(1, STATE_BYTES // size))
    places = np.linspace(0, len(watched) - 1, count).round().astype(int)
    return tuple(watched[place] for place in places.tolist())


def layer_errors(
    artifact: Artifact, reference: ReferenceFile, before: Mapping[int, State], limit: float
) -> list[LayerError]:
    """Observes an artifact in its own engine, one token at each position.

    Args:
        artifact: loaded once more; its session should be closed.
        reference: the file.
        before: watched position → the artifact's canonical state before it.
        limit: of each layer's error.

    Raises:
        RequestError: the engine cannot show values inside the model.
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
    """From sums of squares [positions, layers] of the errors and of the reference."""
    shares = np.sqrt(deltas / np.where(sizes, sizes, 1))
    worst = np.nan_to_num(shares, nan=np.inf).argmax(0).tolist()
    totals = np.sqrt(deltas.sum(0) / np.where(sizes.sum(0), sizes.sum(0), 1)).tolist()
    return [
        LayerError(layer=i, relative_rms=total, worst_position=positions[place], limit=limit)
        for i, (total, place) in enumerate(zip(totals, worst, strict=True))
    ]
