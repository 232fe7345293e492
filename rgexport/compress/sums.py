"""Sums over tokens while a layer runs: x xᵀ of the linears' inputs, g² of their gradients."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgexport.errors import RequestError
from rgexport.griffin import gradients as _differentiable  # noqa: F401  # registers backward passes
from rgexport.griffin.step import Linear
from rgexport.quantize.calibration import column_blocks, pack

_PANEL = 512
"""Rows of a triangle that are computed together: fewer waste less, but run slower."""


class Gram:
    """Σ x xᵀ over tokens, float32: the lower triangles of the diagonal blocks."""

    def __init__(self, site: str, columns: int, device: torch.device):
        self._site = site
        self._bounds = column_blocks(columns)
        self._sums = [torch.zeros(b - a, b - a, device=device) for a, b in self._bounds]
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds the tokens of x [..., columns]."""
        rows = x.detach().flatten(0, -2)
        self._tokens += len(rows)
        for (start, stop), total in zip(self._bounds, self._sums, strict=True):
            _add_triangle(total, rows[:, start:stop])

    def merge(self, other: "Gram") -> None:
        """Adds the sums of other tokens at the same site."""
        self._tokens += other._tokens
        for total, added in zip(self._sums, other._sums, strict=True):
            total += added

    def triangles(self) -> Iterator[np.ndarray]:
        """Yields the packed lower triangle of Σ x xᵀ / N of each block.

        Raises:
            RequestError: a value is not finite.
        """
        for total in self._sums:
            packed = pack(total.cpu().numpy()) / np.float32(self._tokens)
            if not np.isfinite(packed).all():
                raise RequestError(
                    f"the values at {self._site} overflow on this text, so there are no statistics "
                    "of them; check the checkpoint with `rgexport inspect`, or give another --text"
                )
            yield packed


def _add_triangle(total: Tensor, x: Tensor) -> None:
    """Adds xᵀ x to `total`, in panels that end at the diagonal."""
    for start in range(0, len(total), _PANEL):
        stop = min(start + _PANEL, len(total))
        total[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


@contextmanager
def watched_inputs(layer: nn.Module, grams: Mapping[str, Gram]) -> Iterator[None]:
    """Adds the inputs of linears in the `with` block; `grams` are keyed by names in the layer."""

    def see(gram: Gram) -> Any:
        return lambda module, inputs: gram.add(inputs[0])

    with ExitStack() as hooks:
        for name, gram in grams.items():
            hook = layer.get_submodule(name).register_forward_pre_hook(see(gram))
            hooks.callback(hook.remove)
        yield


class SquareSums:
    """Σ g² over tokens, for each output of the linears of one layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def means(self, tokens: int) -> dict[str, np.ndarray]:
        """Returns site of a linear → the mean of g² of each output, float32 [rows]."""
        return {site: (t / tokens).float().cpu().numpy() for site, t in self._sums.items()}

    @contextmanager
    def watched(self, layer: nn.Module) -> Iterator[None]:
        """Adds every backward pass through the linears in the `with` block."""
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
    """Returns Σ g² over tokens of g [..., channels], float64."""
    return gradient.flatten(0, -2).square().sum(0, dtype=torch.float64)
