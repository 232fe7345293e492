"""Runs a model layer by layer over texts; subclasses compute in torch or NumPy."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, layer_tensors
from rgexport.griffin.state import POSITION, State, layer_states, zero_state
from rgexport.griffin.tensor import RowTensor, WeightSource

_PIECE = 2048  # tokens that go through a layer at once, which bounds the memory of its activations

_HEAD_BYTES = 16 << 20  # bytes of the stored embedding that are read at once for the head

_NORM = "final_norm.weight"

Array = Any
"""A NumPy array, or the array type of a subclass."""
Watch = Callable[[int, int, Array], None]
"""Takes the indices of a layer and of a text, and the residual stream [B, T, width] float32 after
the layer."""
RunLayer = Callable[[Array, Array, tuple[Array, Array]], tuple[Array, tuple[Array, Array]]]
"""The residual stream [B, T, width], positions [B, T] and the two states of a layer → the stream
and the states after it."""


@dataclass(frozen=True)
class _Piece:
    start: int
    stop: int
    keeps_state: bool


class LayerByLayer(ABC):
    """A model in float32 with one layer in memory: all tokens go through it before the next."""

    def __init__(self, config: GriffinConfig, weights: WeightSource, *, keep: bool = False):
        """With `keep`, all weights stay in memory in float32 once they are read."""
        self.config = config
        self._weights = weights
        self._keep = keep
        self._layers: dict[int, RunLayer] = {}
        self._head: list[tuple[int, Array]] = []

    @abstractmethod
    def describe(self) -> dict[str, str]: ...

    @abstractmethod
    def _array(self, array: np.ndarray) -> Array: ...

    @abstractmethod
    def _numpy(self, array: Array) -> np.ndarray: ...

    @abstractmethod
    def _embedding(self, ids: Array, table: Array) -> Array:
        """Returns scaled rows of `table` [n, width] for `ids` [B, T]."""

    @abstractmethod
    def _build(self, index: int, weights: dict[str, Array]) -> RunLayer:
        """Returns layer `index`; its weights are named without `layers.{index}.`."""

    @abstractmethod
    def _normalized(self, hidden: Array, weight: Array) -> Array:
        """Applies the final norm to the residual stream [B, T, width]."""

    @abstractmethod
    def _head_logits(self, hidden: Array, rows: Array) -> Array:
        """Returns soft-capped logits [B, t, n] of some rows [n, width] of the embedding."""

    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[Array, State]:
        """Takes tokens [B, T]; returns the final norm's output [B, T, width] float32, and state."""
        state = zero_state(self.config, len(tokens)) if state is None else state
        hidden, states = self.run_each([(tokens, state)])[0]
        return hidden, states[-1]

    def run_each(
        self,
        texts: Sequence[tuple[np.ndarray, State]],
        *,
        stops: Sequence[Sequence[int]] = (),
        watch: Watch | None = None,
    ) -> list[tuple[Array, list[State]]]:
        """Runs texts (tokens [B, T] and the canonical state before them); weights are read once.

        A text goes through a layer in pieces, so that the memory for activations does not grow with
        its length. Returns for each text the final norm's output [B, T, width], and the states
        after its `stops` (ascending numbers of tokens below T) and the end. `watch` gets the
        residual stream after each layer.
        """
        cuts = stops or [()] * len(texts)
        pieces = [_pieces(t.shape[1], cut) for (t, _), cut in zip(texts, cuts, strict=True)]
        hidden = [self.embed(tokens) for tokens, _ in texts]
        states: list[list[State]] = [[{} for p in cut if p.keeps_state] for cut in pieces]
        for index in range(self.config.num_layers):
            layer = self.layer(index)
            for i, (_, state) in enumerate(texts):
                self._through(layer, index, state, hidden[i], pieces[i], states[i])
                if watch is not None:
                    watch(index, i, hidden[i])
        for (_, state), cut, after in zip(texts, pieces, states, strict=True):
            for piece, next_state in zip((p for p in cut if p.keeps_state), after, strict=True):
                next_state[POSITION] = state[POSITION] + piece.stop
        weight = self._load(self._weights[_NORM])
        return [(self._normalized(x, weight), s) for x, s in zip(hidden, states, strict=True)]

    def _through(
        self,
        layer: RunLayer,
        index: int,
        before: State,
        hidden: Array,
        pieces: Sequence[_Piece],
        states: list[State],
    ) -> None:
        names = [spec.name for spec in layer_states(self.config, index, "float32")]
        first, second = (self._array(before[name].astype(np.float32)) for name in names)
        next_states = iter(states)
        for piece in pieces:
            positions = before[POSITION][:, None] + np.arange(piece.start, piece.stop)
            rows = hidden[:, piece.start : piece.stop]
            rows[:], (first, second) = layer(rows, self._array(positions), (first, second))
            if piece.keeps_state:
                after = zip(names, (first, second), strict=True)
                next(next_states).update({name: self._numpy(array) for name, array in after})

    def logits(self, hidden: Array) -> np.ndarray:
        """Returns soft-capped logits [B, t, V] float32 of rows of `run`'s output [B, t, width]."""
        logits = np.empty((*hidden.shape[:2], self.config.vocab_size), np.float32)
        for start, rows in self.head_slabs():
            logits[..., start : start + len(rows)] = self._numpy(self._head_logits(hidden, rows))
        return logits

    def embed(self, tokens: np.ndarray) -> Array:
        """Returns the residual stream [B, T, width] before the first layer, of tokens [B, T]."""
        table = self._weights[EMBEDDING]
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = np.concatenate([table.read(i, i + 1) for i in ids.tolist()]).astype(np.float32)
        return self._embedding(self._array(inverse.reshape(tokens.shape)), self._array(rows))

    def head_slabs(self) -> Iterable[tuple[int, Array]]:
        """Yields the embedding in float32 in slabs, each with its first row's number."""
        if self._head:
            return self._head
        slabs = self._weights[EMBEDDING].slabs(_HEAD_BYTES)
        rows = ((start, self._array(slab.astype(np.float32))) for start, slab in slabs)
        if self._keep:
            self._head = list(rows)
        return self._head or rows

    def layer(self, index: int) -> RunLayer:
        if index in self._layers:
            return self._layers[index]
        prefix = f"layers.{index}."
        names = layer_tensors(self.config, index)
        weights = {name.removeprefix(prefix): self._load(self._weights[name]) for name in names}
        layer = self._build(index, weights)
        if self._keep:
            self._layers[index] = layer
        return layer

    def final_norm(self, hidden: Array) -> Array:
        return self._normalized(hidden, self._load(self._weights[_NORM]))

    def _load(self, weight: RowTensor) -> Array:
        array = np.empty(weight.shape, np.float32)
        for start, rows in weight.slabs():
            array[start : start + len(rows)] = rows
        return self._array(array)


def _pieces(count: int, stops: Sequence[int]) -> list[_Piece]:
    return [
        _Piece(first, min(first + _PIECE, stop), first + _PIECE >= stop)
        for start, stop in zip([0, *stops], [*stops, count], strict=True)
        for first in range(start, stop, _PIECE)
    ]
