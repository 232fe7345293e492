"""Statistics of the head: each token's probability, and the gradient that a text begins with."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgexport.griffin.reference import Reference
from rgexport.progress import Advance

_LOGIT_BYTES = 512 << 20
"""Logits that are in memory at once: the head is read once for as many tokens as they hold."""
_SLAB = 4096
"""Rows of the vocabulary whose probabilities are computed together."""


@dataclass(frozen=True)
class HeadStatistics:
    """What the head does on a text.

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


class _Sums:
    def __init__(self, vocab_size: int):
        self.probability = np.zeros(vocab_size)
        self.fisher = np.zeros(vocab_size)


@torch.no_grad()
def head_statistics(
    model: Reference, hidden: Tensor, gradients: int, seed: int, advance: Advance
) -> HeadStatistics:
    """Statistics over the final norm's output [N, width], with gradients of the first tokens."""
    sums, drawn = _Sums(model.config.vocab_size), np.random.default_rng(seed).random(gradients)
    step = max(1, _LOGIT_BYTES // (4 * model.config.vocab_size))
    labels, found = [], []
    for start in range(0, len(hidden), step):
        tokens = hidden[start : start + step]
        logits = _Logits(model, tokens)
        logits.add_to(sums)
        points = torch.from_numpy(drawn[start : start + step].astype(np.float32)).to(hidden.device)
        if len(points):
            labels.append(logits.draw(points))
            found.append(logits.gradient(labels[-1]))
        advance(len(tokens))
    return HeadStatistics(
        (sums.probability / len(hidden)).astype(np.float32),
        (sums.fisher / len(hidden)).astype(np.float32),
        torch.cat(labels).cpu().numpy(),
        torch.cat(found),
    )


class _Logits:
    """Soft-capped logits of some tokens, taken in slabs of the vocabulary."""

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
        """Probabilities [n, count] of a slab, and the soft cap's derivative there."""
        part = self._values[:, start : start + count]
        slope = 1 - (part / self._cap).square_() if self._cap else 1.0
        return (part - self._log_sum).exp_(), slope

    def _slabs(self) -> range:
        return range(0, self._values.shape[1], _SLAB)

    def add_to(self, sums: _Sums) -> None:
        """Adds these tokens to the sums over all."""
        for start in self._slabs():
            p, slope = self._slab(start, _SLAB)
            here = slice(start, start + p.shape[1])
            sums.probability[here] += p.sum(0).cpu().numpy()
            sums.fisher[here] += (p * (1 - p) * slope * slope).sum(0).cpu().numpy()

    def draw(self, points: Tensor) -> Tensor:
        """For each of the first tokens, the one whose share of [0, 1] contains its point."""
        labels = self._values[: len(points)].argmax(1)  # where sums round below the point
        below = torch.zeros_like(points)
        for start in self._slabs():
            sums = below.unsqueeze(1) + self._slab(start, _SLAB)[0][: len(points)].cumsum(1)
            place = torch.searchsorted(sums, points.unsqueeze(1), right=True).squeeze(1)
            inside = (below <= points) & (place < sums.shape[1])
            labels = torch.where(inside, start + place, labels)
            below = sums[:, -1]
        return labels

    def gradient(self, labels: Tensor) -> Tensor:
        """The gradient of -log p(label) at the head's input, of the first tokens."""
        count = len(labels)
        total = torch.zeros(0)
        for start, rows in self._model.head_slabs():
            p, slope = self._slab(start, len(rows))
            here = (labels >= start) & (labels < start + len(rows))
            p = p[:count]
            p[here, labels[here] - start] -= 1
            slope = slope if isinstance(slope, float) else slope[:count]
            part = (p * slope) @ rows
            total = part if start == 0 else total.add_(part)
        return total
