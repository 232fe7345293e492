"""Measures the KL divergence of a model with a plan's weights from the original."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgexport.griffin import ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import zero_state
from rgexport.griffin.tensor import WeightSource, slab_bounds

_SLAB_BYTES = 32 << 20
"""Most bytes of a slab of the embedding, and of its logits, in float32."""

Read = Callable[[int, int], np.ndarray]
"""First row and end → rows."""


@dataclass(frozen=True)
class Divergence:
    """The mean KL of a text's tokens, in nats, and its standard error over sequences.

    The error is NaN where there is one sequence.
    """

    kl: float
    error: float
    tokens: int


class OriginalRun:
    """The original's hidden states on a text, from one run, for comparison with plans."""

    def __init__(
        self, config: GriffinConfig, weights: WeightSource, sequences: Sequence[np.ndarray]
    ):
        self._config, self._weights = config, weights
        self._texts = _batches(sequences)
        self._hidden = self._run(weights)

    def divergence(self, weights: WeightSource) -> Divergence:
        """Returns the KL divergence of the model with other weights."""
        values = self._divergences(self._run(weights), weights[EMBEDDING].read).numpy()
        mean = values.mean()
        lengths = [ids.shape[1] for ids in self._texts for _ in ids]
        sums = np.add.reduceat(values - mean, np.cumsum([0, *lengths[:-1]]))
        count = len(lengths)
        spread = np.sqrt(np.square(sums).sum() * count / (count - 1)) if count > 1 else np.nan
        return Divergence(float(mean), float(spread / len(values)), len(values))

    def _run(self, weights: WeightSource) -> Tensor:
        """Returns the head's input [tokens, width]; one layer's weights are in memory at a time."""
        model = Reference(self._config, weights)
        texts = [(ids, zero_state(self._config, len(ids))) for ids in self._texts]
        return torch.cat([hidden.flatten(0, 1) for hidden, _ in model.run_each(texts)])

    @torch.inference_mode()
    def _divergences(self, hidden: Tensor, read: Read) -> Tensor:
        """Returns the KL at each token, float64; computes logits in slabs of the vocabulary."""
        shape = self._weights[EMBEDDING].shape
        sums = _SlabSums(len(hidden))
        for start, stop in slab_bounds(shape[0], 4 * max(shape[1], len(hidden)), _SLAB_BYTES):
            before = self._weights[EMBEDDING].read(start, stop)
            sums.add(self._logits(self._hidden, before), self._logits(hidden, read(start, stop)))
        return sums.divergences()

    def _logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        part = ops.linear(hidden, torch.from_numpy(rows.astype(np.float32)), None, "lm_head")
        return ops.soft_cap(part, self._config.soft_cap, "logits")


class _SlabSums:
    """Sums over the vocabulary for each token, from one slab after another."""

    def __init__(self, tokens: int):
        self._log_p = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self._log_q = self._log_p.clone()
        self._mean = torch.zeros(tokens, dtype=torch.float64)
        """The mean difference of logits, weighted by the original's probabilities so far."""

    def add(self, original: Tensor, changed: Tensor) -> None:
        """Adds logits [tokens, slab]."""
        p = original.logsumexp(1).double()
        total = torch.logaddexp(self._log_p, p)
        mean = (original.softmax(1) * (original - changed)).sum(1, dtype=torch.float64)
        self._mean = self._mean * (self._log_p - total).exp() + mean * (p - total).exp()
        self._log_p = total
        self._log_q = torch.logaddexp(self._log_q, changed.logsumexp(1).double())

    def divergences(self) -> Tensor:
        """Returns KL(original ‖ other) of each token."""
        return (self._mean - self._log_p + self._log_q).clamp_min(0)


def _batches(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Groups sequences of equal length: int64 [B, T] each."""
    groups: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence), []).append(sequence)
    return [np.stack(group).astype(np.int64) for group in groups.values()]
