"""Runs a model layer by layer over texts; subclasses compute in torch or NumPy."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer import Array, Layer, LayerState
from rgexport.griffin.layout import EMBEDDING, layer_tensors
from rgexport.griffin.state import POSITION, State, layer_states, zero_state
from rgexport.griffin.tensor import RowTensor, WeightSource

_PIECE = 2048  # tokens that go through a layer at once, which bounds the memory of its activations

_HEAD_BYTES = 16 << 20  # bytes of the stored embedding that are read at once for the head

_NORM = "final_norm.weight"

Watch = Callable[[int, int, Array], None]
"""Takes the indices of a layer and of a text, and the residual stream [B, T, width] float32 after
the layer."""


class LayerByLayer(ABC):
    """A model in float32 with one layer in memory: all tokens go through it before the next."""

    def __init__(self, config: GriffinConfig, weights: WeightSource, *, keep: bool = False):
        """With `keep`, all weights stay in memory in float32 once they are read."""
        self.config = config
        self._weights = weights
        self._keep = keep
        self._layers: dict[int, Layer] = {}
        self._head: list[tuple[int, Array]] = []

    @abstractmethod
    def describe(self) -> dict[str, str]: ...

    @abstractmethod
    def _compute(self, site: str, op: str, *arguments: Any) -> Any:
        """Computes an op, see `griffin.layer.Compute`."""

    def _array(self, array: np.ndarray) -> Array:
        return array

    def _numpy(self, array: Array) -> np.ndarray:
        return np.asarray(array)

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
        ends = [[*cut, t.shape[1]] for (t, _), cut in zip(texts, cuts, strict=True)]
        hidden = [self.embed(tokens) for tokens, _ in texts]
        states: list[list[State]] = [
            [{POSITION: state[POSITION] + stop} for stop in cut]
            for (_, state), cut in zip(texts, ends, strict=True)
        ]
        for index in range(self.config.num_layers):
            layer = self.layer(index)
            for i, (_, state) in enumerate(texts):
                self._through(layer, state, hidden[i], ends[i], states[i])
                if watch is not None:
                    watch(index, i, hidden[i])
        weight = self._load(self._weights[_NORM])
        return [(self._normalized(x, weight), s) for x, s in zip(hidden, states, strict=True)]

    def _through(
        self, layer: Layer, before: State, hidden: Array, stops: list[int], states: list[State]
    ) -> None:
        """Runs a layer on `hidden`, in place; adds its states after each of `stops` to `states`."""
        names = [spec.name for spec in layer_states(self.config, layer.index, "float32")]
        first, second = (self._array(before[name].astype(np.float32)) for name in names)
        for start, stop, state in zip([0, *stops], stops, states, strict=False):
            for piece in range(start, stop, _PIECE):
                end = min(piece + _PIECE, stop)
                positions = before[POSITION][:, None] + np.arange(piece, end)
                rows = hidden[:, piece:end]
                rows[:], (first, second) = layer(rows, self._array(positions), (first, second))
            after = zip(names, (first, second), strict=True)
            state.update({name: self._numpy(array) for name, array in after})

    def logits(self, hidden: Array) -> np.ndarray:
        """Returns soft-capped logits [B, t, V] float32 of rows of `run`'s output [B, t, width]."""
        logits = np.empty((*hidden.shape[:2], self.config.vocab_size), np.float32)
        for start, rows in self.head_slabs():
            slab = self._compute("lm_head", "linear", hidden, rows, None)
            slab = self._compute("logits", "soft_cap", slab, self.config.soft_cap)
            logits[..., start : start + len(rows)] = self._numpy(slab)
        return logits

    def embed(self, tokens: np.ndarray) -> Array:
        """Returns the residual stream [B, T, width] before the first layer, of tokens [B, T]."""
        table = self._weights[EMBEDDING]
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = np.concatenate([table.read(i, i + 1) for i in ids.tolist()]).astype(np.float32)
        used = self._array(inverse.reshape(tokens.shape)), self._array(rows)
        return self._compute("embed_tokens", "embedding", *used, self.config.embedding_scale)

    def head_slabs(self) -> Iterable[tuple[int, Array]]:
        """Yields the embedding in float32 in slabs, each with its first row's number."""
        if self._head:
            return self._head
        slabs = self._weights[EMBEDDING].slabs(_HEAD_BYTES)
        rows = ((start, self._array(slab.astype(np.float32))) for start, slab in slabs)
        if self._keep:
            self._head = list(rows)
        return self._head or rows

    def layer(self, index: int) -> Layer:
        if index in self._layers:
            return self._layers[index]
        names = layer_tensors(self.config, index)
        weights = {name: self._load(self._weights[name]) for name in names}
        layer = Layer(self.config, index, weights, self._compute)
        if self._keep:
            self._layers[index] = layer
        return layer

    def final_norm(self, hidden: Array) -> Array:
        return self._normalized(hidden, self._load(self._weights[_NORM]))

    def _normalized(self, hidden: Array, weight: Array) -> Array:
        return self._compute("final_norm", "rms_norm", hidden, weight, self.config.rms_eps)

    def beginning(self, index: int, batch: int, length: int) -> tuple[Array, LayerState]:
        """Returns positions [B, T] from 0 on, and a layer's states before them.

        There are no keys before the first token: a window as long as the text is enough.
        """
        short = replace(self.config, window=min(self.config.window, length))
        first, second = (
            self._array(np.zeros((batch, *spec.shape), np.float32))
            for spec in layer_states(short, index, "float32")
        )
        return self._array(np.tile(np.arange(length), (batch, 1))), (first, second)

    def _load(self, weight: RowTensor) -> Array:
        array = np.empty(weight.shape, np.float32)
        for start, rows in weight.slabs():
            array[start : start + len(rows)] = rows
        return self._array(array)
