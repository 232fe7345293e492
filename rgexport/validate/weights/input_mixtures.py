"""Random mixtures of the inputs of a model's linears, which weigh the errors of their weights.

An error E = Ŵ - W of a weight matters as far as it changes the linear's output, ‖E X‖, where the
columns of X are the inputs over a text. With random signs s, a mixture p = X s has
mean ‖E p‖² = ‖E X‖² (Hutchinson 1990), so a few mixtures of each input stand for the whole text.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import linear_inputs
from rgexport.quantize.steps import StepSizes

MIXTURES = 4
"""Mixtures of each input."""
_SEED = 20240411

Mixtures = Mapping[str, np.ndarray]
"""Site whose result the linears take → mixtures of it, [MIXTURES, K] float32."""


class MixtureRecorder:
    """Mixes the inputs of all linears while a reference runs over one text from its beginning."""

    def __init__(self, config: GriffinConfig, tokens: int):
        """`tokens` is the length of the text."""
        self._sites = set(linear_inputs(config).values())
        signs = np.random.default_rng(_SEED).integers(0, 2, (MIXTURES, tokens))
        self._signs = (2 * signs - 1).astype(np.float32)
        self._tokens: dict[str, int] = {}
        self.mixtures: dict[str, np.ndarray] = {}
        """Those of the tokens so far."""

    def look(
        self, site: str, op: str, arguments: tuple[Any, ...], results: tuple[np.ndarray, ...]
    ) -> None:
        """Takes the results of an op over the next tokens, as `NumpyReference.look` does."""
        if site not in self._sites:
            return
        inputs = results[0][0]
        start = self._tokens.get(site, 0)
        mixed = self._signs[:, start : start + len(inputs)] @ inputs
        self._tokens[site] = start + len(inputs)
        self.mixtures[site] = self.mixtures.get(site, 0) + mixed


def output_noise(error: np.ndarray, steps: StepSizes, mixtures: np.ndarray) -> tuple[float, float]:
    """Σ ‖E p‖² over mixtures p [m, K], of an error E [n, K]; and what rounding to nearest makes."""
    return float(np.square(mixed(error, mixtures)).sum()), expected_noise(steps, mixtures)


def mixed(rows: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
    """Products of rows [n, K] with mixtures [m, K]: [n, m] float64."""
    # Not `rows @ mixtures.T`: BLAS would start threads of its own in each of ours.
    products = [np.einsum("nk,k->n", rows, mixture) for mixture in mixtures]
    return np.stack(products, 1).astype(np.float64)


def expected_noise(steps: StepSizes, mixtures: np.ndarray) -> float:
    """Σ ‖E p‖² over mixtures p [m, K] that rounding to nearest makes with some steps."""
    squares = np.square(mixtures, dtype=np.float64).sum(0)
    return float(steps.rounding(mixtures.shape[1], squares).sum())
