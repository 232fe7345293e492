"""Gradients at the outputs of a layer's linears, from those at its output."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgexport.griffin import gradients as _differentiable  # noqa: F401  # by being imported
from rgexport.griffin.step import Linear


class SquareSums:
    """Σ g² over tokens, for each output of the linears of one layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def means(self, tokens: int) -> dict[str, np.ndarray]:
        """Site of a linear → the mean of g² of each output, float32 [rows]."""
        return {site: (t / tokens).float().cpu().numpy() for site, t in self._sums.items()}

    @contextmanager
    def watched(self, layer: nn.Module) -> Iterator[None]:
        """While the block runs, every backward pass through the linears is added."""
        with ExitStack() as hooks:
            for module in layer.modules():
                if isinstance(module, Linear):
                    hooks.callback(module.register_forward_hook(self._watch).remove)
            yield

    def _watch(self, module: Any, inputs: Any, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            squares = square_sum(gradient)
            self._sums[module.site] = self._sums.get(module.site, 0) + squares

        output.register_hook(add)


def square_sum(gradient: Tensor) -> Tensor:
    """Σ g² over tokens of g [..., channels], in float64."""
    return gradient.flatten(0, -2).square().sum(0, dtype=torch.float64)
