"""Sums of x xᵀ of what linears read, while a layer runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rgexport.errors import RequestError
from rgexport.quantize.calibration_format import column_blocks, pack

_PANEL = 512
"""Rows of a triangle that are computed together: fewer would waste less, but run slower."""


class Gram:
    """Σ x xᵀ over tokens, in float32: lower triangles of the diagonal blocks."""

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
        """Adds the tokens of other sums of the same site."""
        self._tokens += other._tokens
        for total, more in zip(self._sums, other._sums, strict=True):
            total += more

    def triangles(self) -> Iterator[np.ndarray]:
        """The packed lower triangle of Σ x xᵀ / N of each block.

        Raises:
            RequestError: it is not finite.
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
    """While the block runs, adds what linears read; `grams` are by their names in the layer."""

    def see(gram: Gram) -> Any:
        return lambda module, inputs: gram.add(inputs[0])

    with ExitStack() as hooks:
        for name, gram in grams.items():
            hook = layer.get_submodule(name).register_forward_pre_hook(see(gram))
            hooks.callback(hook.remove)
        yield
