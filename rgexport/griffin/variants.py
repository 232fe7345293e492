"""Variants of a model that each take one part from another model's weights."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import layer_states
from rgexport.griffin.step import Layer
from rgexport.griffin.tensor import WeightSource


class Variants(Reference):
    """A model, and for each of its parts the variant with another model's weights in that part.

    All go through the layers together. Before its part, a variant equals the model, so the batch
    grows from layer to layer. One layer of one of the two models is in memory at a time.
    """

    def __init__(
        self, config: GriffinConfig, weights: WeightSource, other: WeightSource, *, device: str
    ):
        """`weights` are the model's; `other` are those that replace a part."""
        super().__init__(config, weights, device=device)
        self._other = Reference(config, other, device=device)
        layers = (f"layers.{i}" for i in range(config.num_layers))
        self.parts = ("embed_tokens", *layers, "final_norm")
        """The embedding is the head, too."""

    @torch.inference_mode()
    def run_all(self, tokens: np.ndarray) -> Tensor:
        """Tokens [T] from the beginning → the final norm's output [1 + parts, T, width] float32.

        The first row is the model's, the others are in the order of the parts.
        """
        text = tokens[None]
        hidden = torch.cat([self.embed(text), self._other.embed(text)])
        for index in range(self.config.num_layers):
            other = self._take(self._other.layer(index), index, hidden[:1])
            hidden = torch.cat([self._take(self.layer(index), index, hidden), other])
        return torch.cat([self.final_norm()(hidden), self._other.final_norm()(hidden[:1])])

    def all_logits(self, hidden: Tensor) -> np.ndarray:
        """Soft-capped logits [1 + parts, t, V] float32 of positions of what `run_all` gives."""
        logits = self.logits(hidden)
        logits[1] = self._other.logits(hidden[1:2])[0]
        return logits

    def _take(self, layer: Layer, index: int, hidden: Tensor) -> Tensor:
        """[B, T, width] → the same, from the state before the first token."""
        batch, length = hidden.shape[:2]
        # There are no keys before the first token: a window as long as the text is enough.
        window = min(self.config.window, length)
        specs = layer_states(dataclasses.replace(self.config, window=window), index, "float32")
        first, second = (hidden.new_zeros(batch, *spec.shape) for spec in specs)
        positions = torch.arange(length, device=hidden.device).expand(batch, length)
        return layer(hidden, positions, (first, second))[0]
