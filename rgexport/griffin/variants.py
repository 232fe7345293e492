"""Variants of a model that each take one part from another model's weights."""

import dataclasses

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_by_layer import RunLayer
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import layer_states
from rgexport.griffin.tensor import WeightSource


class Variants(NumpyReference):
    """A model, and for each of its parts the variant with another model's weights in that part.

    All go through the layers together. Before its part, a variant equals the model, so the batch
    grows from layer to layer. One layer of one of the two models is in memory at a time.
    """

    def __init__(self, config: GriffinConfig, weights: WeightSource, other: WeightSource):
        """`weights` are the model's; `other` are those that replace a part."""
        super().__init__(config, weights)
        self._other = NumpyReference(config, other)
        layers = (f"layers.{i}" for i in range(config.num_layers))
        self.parts = ("embed_tokens", *layers, "final_norm")
        """The embedding is the head, too."""

    def run_all(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [T] from the beginning → the final norm's output [1 + parts, T, width] float32.

        The first row is the model's, the others are in the order of the parts.
        """
        text = tokens[None]
        hidden = np.concatenate([self.embed(text), self._other.embed(text)])
        for index in range(self.config.num_layers):
            other = self._take(self._other.layer(index), index, hidden[:1])
            hidden = np.concatenate([self._take(self.layer(index), index, hidden), other])
        return np.concatenate([self.final_norm(hidden), self._other.final_norm(hidden[:1])])

    def all_logits(self, hidden: np.ndarray) -> np.ndarray:
        """Soft-capped logits [1 + parts, t, V] float32 of positions of what `run_all` gives."""
        logits = self.logits(hidden)
        logits[1] = self._other.logits(hidden[1:2])[0]
        return logits

    def _take(self, layer: RunLayer, index: int, hidden: np.ndarray) -> np.ndarray:
        """[B, T, width] → the same, from the state before the first token."""
        batch, length = hidden.shape[:2]
        # There are no keys before the first token: a window as long as the text is enough.
        window = min(self.config.window, length)
        specs = layer_states(dataclasses.replace(self.config, window=window), index, "float32")
        first, second = (np.zeros((batch, *spec.shape), np.float32) for spec in specs)
        positions = np.broadcast_to(np.arange(length), (batch, length))
        after: np.ndarray = layer(hidden, positions, (first, second))[0]
        return after
