"""Choosing the next token."""

import math
from dataclasses import dataclass, field

import numpy as np

from rgexport.errors import RequestError


@dataclass(frozen=True)
class Sampler:
    """Greedy at temperature 0; else temperature, then top-k, then top-p, in float64.

    `top_k` 0 and `top_p` 1 mean off. Equal logits go to the lower id first. The same seed gives
    the same tokens from the same logits.

    Raises:
        RequestError: an option is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    _rng: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number of 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or the number of tokens to choose from"),
            ("top_p", 0 < self.top_p <= 1, "a probability above 0, up to 1 (off)"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise RequestError(f"{name} is {getattr(self, name)}; expected {expected}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise RequestError(
                "top_k and top_p change nothing at temperature 0, which takes the most likely "
                "token; pass a temperature too, such as --temperature 0.7"
            )
        object.__setattr__(self, "_rng", np.random.default_rng(self.seed))

    def __call__(self, logits: np.ndarray) -> int:
        """The next token for logits [vocab].

        Raises:
            RequestError: the logits are NaN or infinite.
        """
        if not np.isfinite(logits.max()):
            raise RequestError(
                "the model's logits are NaN or infinite; "
                "check the artifact with `rgexport validate`"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = self.distribution(logits)
        sums = probabilities.cumsum(out=probabilities)
        point = np.searchsorted(sums, self._rng.random(), side="right")
        return int(tokens[min(int(point), len(tokens) - 1)])  # the sum may round below 1

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may come next, and their probabilities (float64, sum 1)."""
        best = float(logits.max())
        if 0 < self.top_k < len(logits):
            tokens = self._top_k(logits)
            logits = logits[tokens]
        else:
            tokens = np.arange(len(logits))
        # In place: with a vocabulary of 256,000, allocating takes longer than computing.
        # The best is subtracted before the division, so that a tiny temperature cannot overflow.
        weights = logits.astype(np.float64)
        weights -= best
        weights /= self.temperature
        np.exp(weights, out=weights)
        weights /= weights.sum()
        if self.top_p < 1:
            kept = self._top_p(weights)
            tokens, weights = tokens[kept], weights[kept]
            weights /= weights.sum()
        return tokens, weights

    def _top_k(self, logits: np.ndarray) -> np.ndarray:
        """The `top_k` tokens with the highest logits."""
        rank = len(logits) - self.top_k
        candidates = np.flatnonzero(logits >= np.partition(logits, rank)[rank])
        best: np.ndarray = candidates[_descending(logits[candidates])[: self.top_k]]
        return best

    def _top_p(self, probabilities: np.ndarray) -> np.ndarray:
        """Indices of the fewest probabilities whose sum reaches `top_p`."""
        # All smaller ones sum to less than 1 - top_p: they need not be sorted.
        least = (1 - self.top_p) / len(probabilities)
        likely = np.flatnonzero(probabilities >= least)
        order = likely[_descending(probabilities[likely])]
        count = int(np.searchsorted(probabilities[order].cumsum(), self.top_p)) + 1
        fewest: np.ndarray = order[:count]
        return fewest


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")
