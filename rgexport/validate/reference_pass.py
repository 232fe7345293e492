"""A reference's teacher-forced pass over a text, kept as hidden states; logits come on demand."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State, zero_state
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.progress import Advance, task
from rgexport.validate.states import checkpoints, recent
from rgexport.validate.weights.sketch import MixtureRecorder, Mixtures


class ReferenceModel(Protocol):
    """What is needed of `griffin.layer_by_layer.LayerByLayer`, and of DeepMind's model."""

    @property
    def config(self) -> GriffinConfig:
        """The model's configuration."""
        ...

    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[Any, State]:
        """Tokens [B, T] → hidden states [B, T, width], an array of its own type, and the state."""
        ...

    def run_each(
        self,
        texts: Sequence[tuple[np.ndarray, State]],
        *,
        stops: Sequence[Sequence[int]] = (),
        watch: Callable[[int, int, Any], None] | None = None,
    ) -> list[tuple[Any, list[State]]]:
        """As `run`, for several tokens and the states before them, reading each weight once."""
        ...

    def describe(self) -> dict[str, str]:
        """Device, dtype and implementation, for reports."""
        ...

    def logits(self, hidden: Any) -> np.ndarray:
        """Hidden states [B, t, width] → logits [B, t, vocab] float32."""
        ...


@dataclass(frozen=True)
class Pass:
    """One pass over tokens [T]: `hidden` is [1, T, width], `state` the state after it.

    `drift` has the states after some numbers of tokens, reduced by `states.recent`. `inputs` are
    mixtures of what the linears took, where they were asked for.
    """

    model: ReferenceModel
    hidden: Any
    state: State
    drift: dict[int, State]
    inputs: Mixtures

    def logits(self, start: int, stop: int) -> np.ndarray:
        """Logits [stop - start, vocab] float32 of these positions."""
        return self.model.logits(self.hidden[:, start:stop])[0]


def run_reference(
    label: str,
    config: GriffinConfig,
    weights: WeightSource,
    tokens: np.ndarray,
    *,
    mix_inputs: bool = False,
) -> Pass:
    """Runs a reference over tokens [T]; the progress is that of the weights it reads."""
    stops = checkpoints(len(tokens))
    with watched_layers(label, weights) as watched:
        model, recorder = NumpyReference(config, watched), MixtureRecorder(config, len(tokens))
        model.look = recorder.look if mix_inputs else None
        text = (tokens[None], zero_state(config, 1))
        ((hidden, states),) = model.run_each([text], stops=[stops])
    drift = {stop: recent(state) for stop, state in zip(stops, states, strict=False)}
    return Pass(NumpyReference(config, weights), hidden, states[-1], drift, recorder.mixtures)


@contextmanager
def watched_layers(label: str, weights: WeightSource) -> Iterator[WeightSource]:
    """The same weights; while the block runs, progress shows how much of them has been read.

    The embedding does not count, since only some of its rows are read.
    """
    layers = {name: tensor for name, tensor in weights.items() if name != EMBEDDING}
    with task(label, sum(tensor.nbytes for tensor in layers.values())) as advance:
        yield {**weights, **{name: _watched(tensor, advance) for name, tensor in layers.items()}}


@dataclass
class SharedPasses:
    """Passes of originals, each of which serves all artifacts that are compared with it."""

    _done: dict[tuple[Path, GriffinConfig, bytes], Pass] = field(default_factory=dict)

    def has(self, original: Checkpoint, tokens: np.ndarray) -> bool:
        """Whether an original ran over tokens [T] before."""
        return _key(original, tokens) in self._done

    def run_reference(self, original: Checkpoint, tokens: np.ndarray) -> Pass:
        """Runs an original over tokens [T], unless it did that before."""
        key = _key(original, tokens)
        if key not in self._done:
            config, weights = original.config, original.weights
            self._done[key] = run_reference(
                "Running the original", config, weights, tokens, mix_inputs=True
            )
        return self._done[key]


def _key(original: Checkpoint, tokens: np.ndarray) -> tuple[Path, GriffinConfig, bytes]:
    return original.path, original.config, tokens.tobytes()


def _watched(tensor: RowTensor, advance: Advance) -> RowTensor:
    def read(start: int, stop: int) -> np.ndarray:
        rows = tensor.read(start, stop)
        advance(rows.nbytes)
        return rows

    return dataclasses.replace(tensor, read=read)
