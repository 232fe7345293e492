"""Measures what a plan costs: the KL of the model with its weights to the original."""

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
"""Of the embedding, and of the logits, in float32: those that are compared at once."""

Read = Callable[[int, int], np.ndarray]
"""From the numbers of the first row and the one after the last to rows."""


@dataclass(frozen=True)
class Divergence:
    """The mean KL of a text's tokens, in nats, and its standard error over sequences.

    The error is NaN where there is one sequence.
    """

    kl: float
    error: float
    tokens: int


class Original:
    """What the original computes on a text, to compare others with: run once."""

    def __init__(
        self, config: GriffinConfig, weights: WeightSource, sequences: Sequence[np.ndarray]
    ):
        self._config, self._weights = config, weights
        self._texts = _batches(sequences)
        self._hidden = self._run(weights)

    def divergence(self, weights: WeightSource) -> Divergence:
        """How far a model with other weights is from the original."""
        found = self._divergences(self._run(weights), weights[EMBEDDING].read).numpy()
        mean = found.mean()
        lengths = [ids.shape[1] for ids in self._texts for _ in ids]
        sums = np.add.reduceat(found - mean, np.cumsum([0, *lengths[:-1]]))
        count = len(lengths)
        spread = np.sqrt(np.square(sums).sum() * count / (count - 1)) if count > 1 else np.nan
        return Divergence(float(mean), float(spread / len(found)), len(found))

    def _run(self, weights: WeightSource) -> Tensor:
        """The head's input [tokens, width]; one layer's weights are in memory at a time."""
        model = Reference(self._config, weights)
        texts = [(ids, zero_state(self._config, len(ids))) for ids in self._texts]
        return torch.cat([hidden.flatten(0, 1) for hidden, _ in model.run_each(texts)])

    @torch.inference_mode()
    def _divergences(self, hidden: Tensor, read: Read) -> Tensor:
        """The KL at each token, float64; logits exist for a slab of the vocabulary at a time."""
        shape = self._weights[EMBEDDING].shape
        sums = _Sums(len(hidden))
        for start, stop in slab_bounds(shape[0], 4 * max(shape[1], len(hidden)), _SLAB_BYTES):
            before = self._weights[EMBEDDING].read(start, stop)
            sums.add(self._logits(self._hidden, before), self._logits(hidden, read(start, stop)))
        return sums.divergences()

    def _logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        part = ops.linear(hidden, torch.from_numpy(rows.astype(np.float32)), None, "lm_head")
        return ops.soft_cap(part, self._config.soft_cap, "logits")


class _Sums:
    """Sums over the vocabulary, of which only slabs are seen, for each token."""

    def __init__(self, tokens: int):
        self._log_p = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self._log_q = self._log_p.clone()
        self._mean = torch.zeros(tokens, dtype=torch.float64)
        """Of the difference of logits, weighted by the original's probabilities so far."""

    def add(self, original: Tensor, other: Tensor) -> None:
        """Adds logits [tokens, slab]."""
        p = original.logsumexp(1).double()
        total = torch.logaddexp(self._log_p, p)
        mean = (original.softmax(1) * (original - other)).sum(1, dtype=torch.float64)
        self._mean = self._mean * (self._log_p - total).exp() + mean * (p - total).exp()
        self._log_p = total
        self._log_q = torch.logaddexp(self._log_q, other.logsumexp(1).double())

    def divergences(self) -> Tensor:
        """KL(original ‖ other) of each token."""
        return (self._mean - self._log_p + self._log_q).clamp_min(0)


def _batches(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Sequences of equal length together: int64 [B, T] each."""
    alike: dict[int, list[np.ndarray]] = {}
    for sequence in sequences:
        alike.setdefault(len(sequence), []).append(sequence)
    return [np.stack(some).astype(np.int64) for some in alike.values()]
