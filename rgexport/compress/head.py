"""Statistics of the head: each token's probability, and the gradient at the head's input."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgexport.griffin.reference import Reference
from rgexport.progress import Advance

_LOGIT_BYTES = 512 << 20
"""Most bytes of logits in memory; the head is read once for as many tokens."""
_SLAB = 4096
"""Rows of the vocabulary per computed slab of probabilities."""


@dataclass(frozen=True)
class HeadStatistics:
    """Statistics over the tokens of a text.

    Attributes:
        probability: the mean probability of each token, float32 [vocab].
        fisher: the mean of p (1 - p) c², float32 [vocab]; c is the soft cap's derivative.
        labels: a token for each of the first positions, drawn from the model's distribution.
        gradient: of their summed negative log-likelihood at the head's input, [n, width].
    """

    probability: np.ndarray
    fisher: np.ndarray
    labels: np.ndarray
    gradient: Tensor


@torch.no_grad()
def head_statistics(
    model: Reference, hidden: Tensor, gradients: int, seed: int, advance: Advance
) -> HeadStatistics:
    """Computes statistics of the final norm's output [N, width]; gradients of the first tokens."""
    sums = np.zeros((2, model.config.vocab_size))
    drawn = np.random.default_rng(seed).random(gradients).astype(np.float32)
    step = max(1, _LOGIT_BYTES // (4 * model.config.vocab_size))
    labels, gradient = [], []
    for start in range(0, len(hidden), step):
        tokens = hidden[start : start + step]
        logits = _Logits(model, tokens)
        logits.add_to(sums)
        points = torch.from_numpy(drawn[start : start + step]).to(hidden.device)
        if len(points):
            labels.append(logits.draw(points))
            gradient.append(logits.gradient(labels[-1]))
        advance(len(tokens))
    probability, fisher = (sums / len(hidden)).astype(np.float32)
    return HeadStatistics(probability, fisher, torch.cat(labels).cpu().numpy(), torch.cat(gradient))


class _Logits:
    def __init__(self, model: Reference, hidden: Tensor):
        self._model, self._cap = model, model.config.soft_cap
        shape = len(hidden), model.config.vocab_size
        self._values = torch.empty(shape, device=hidden.device)
        log_sum = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        for start, rows in model.head_slabs():
            part = self._values[:, start : start + len(rows)]
            torch.mm(hidden, rows.T, out=part)
            if self._cap:
                part.div_(self._cap).tanh_().mul_(self._cap)
            log_sum = torch.logaddexp(log_sum, part.logsumexp(1))
        self._log_sum = log_sum.unsqueeze(1)

    def _slab(self, start: int, count: int) -> tuple[Tensor, Tensor | float]:
        """Returns probabilities [n, count] of a slab, and the soft cap's derivative."""
        part = self._values[:, start : start + count]
        slope = 1 - (part / self._cap).square_() if self._cap else 1.0
        return (part - self._log_sum).exp_(), slope

    def add_to(self, sums: np.ndarray) -> None:
        """Adds these tokens to the sums of probabilities and of Fisher information [2, vocab]."""
        for start in range(0, self._values.shape[1], _SLAB):
            p, slope = self._slab(start, _SLAB)
            slab = sums[:, start : start + p.shape[1]]
            slab[0] += p.sum(0).cpu().numpy()
            slab[1] += (p * (1 - p) * slope * slope).sum(0).cpu().numpy()

    def draw(self, points: Tensor) -> Tensor:
        """Draws a label for each of the first tokens, by inverting its cumulative sums."""
        labels = self._values[: len(points)].argmax(1)  # where sums round below the point
        below = torch.zeros_like(points)
        for start in range(0, self._values.shape[1], _SLAB):
            sums = below.unsqueeze(1) + self._slab(start, _SLAB)[0][: len(points)].cumsum(1)
            index = torch.searchsorted(sums, points.unsqueeze(1), right=True).squeeze(1)
            inside = (below <= points) & (index < sums.shape[1])
            labels = torch.where(inside, start + index, labels)
            below = sums[:, -1]
        return labels

    def gradient(self, labels: Tensor) -> Tensor:
        """Returns the gradient of -log p(label) at the head's input for the first tokens."""
        count = len(labels)
        total = torch.zeros(0)
        for start, rows in self._model.head_slabs():
            p, slope = self._slab(start, len(rows))
            inside = (labels >= start) & (labels < start + len(rows))
            p = p[:count]
            p[inside, labels[inside] - start] -= 1
            slope = slope if isinstance(slope, float) else slope[:count]
            part = (p * slope) @ rows
            total = part if start == 0 else total.add_(part)
        return total
