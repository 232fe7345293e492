"""Sampling of the next token.

The order is that of vLLM and Hugging Face: penalties and biases change logits, the temperature
divides them, then top-k, top-p and min-p drop tokens. Sorting all of 256,000 logits is slow: only
some are sorted, and the same tokens are chosen with the same probabilities.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import default_rng

from rgexport.errors import RequestError

_BLOCK = 512
"""Number of tokens whose maximum or sum is computed in one go: 256,000 tokens are 500 blocks."""

_FIRST_SORTED = 64
"""Number of tokens that are sorted in the first attempt to reach top-p."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling; the defaults choose the most likely token.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: number of the most likely tokens to choose from; 0 for all.
        top_p: share of the probability that the most likely tokens must reach; 1 for all.
        min_p: smallest probability of a token, relative to the largest one.
        repetition_penalty: Hugging Face's, which counts the prompt too.
        presence_penalty: OpenAI's, subtracted once from the logit of a token of the reply.
        frequency_penalty: OpenAI's, subtracted for each occurrence in the reply.
        logit_bias: id → number that is added to its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        repetition = self.repetition_penalty
        checks = [
            ("temperature", 0 <= self.temperature < math.inf, "a number of 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or the number of tokens to choose from"),
            ("top_p", 0 < self.top_p <= 1, "a probability above 0, up to 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "a part from 0 (off) to 1"),
            ("repetition_penalty", 0.01 <= repetition <= 100, "a factor of 0.01 to 100; 1 is off"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number; 0 is off"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number; 0 is off"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ]
        for name, is_valid, expected in checks:
            if not is_valid:
                raise RequestError(f"{name} is {getattr(self, name)}; expected {expected}")
        for token, bias in self.logit_bias.items():
            if token < 0 or math.isnan(bias):
                raise RequestError(f"logit_bias of {token} is {bias}; expected ids and numbers")


class Sampler:
    """The choice of one reply's tokens; it counts them for the penalties.

    It is not thread-safe.
    """

    def __init__(self, options: Sampling, prompt: Sequence[int] = ()) -> None:
        self.options = options
        self._random = default_rng(options.seed)
        if options.repetition_penalty == 1:
            prompt = ()  # no other penalty counts it, and sorting a long one is slow
        self._prompt = np.unique(np.array(prompt, np.int64))
        self._reply = Counter[int]()
        bias = options.logit_bias
        self._biased = np.fromiter(bias.keys(), np.int64, len(bias))
        self._biases = np.fromiter(bias.values(), np.float32, len(bias))

    def __call__(self, logits: np.ndarray, mask: np.ndarray | None = None) -> int:
        """Returns the next token for logits [vocab]; `mask` [vocab] adds 0 or -inf to each."""
        token = self._choose(self._adjusted(logits, mask))
        self._reply[token] += 1
        return token

    def _choose(self, logits: np.ndarray) -> int:
        if not np.isfinite(logits.max()):
            raise RequestError(
                "the model's logits are NaN or infinite; check the artifact by `rgexport validate`"
            )
        if self.options.temperature == 0:
            return int(logits.argmax())
        tokens, weights = _truncated(logits, self.options)
        index = _draw(weights, self._random.random())
        return index if tokens is None else int(tokens[index])

    def _adjusted(self, logits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Returns the logits after mask, penalties and biases; never changes its arguments."""
        if mask is not None:
            logits = logits + mask
        options = self.options
        has_penalties = (
            options.repetition_penalty != 1
            or options.presence_penalty != 0
            or options.frequency_penalty != 0
        )
        if not has_penalties and not options.logit_bias:
            return logits

        logits = logits.copy()
        reply = np.fromiter(self._reply.keys(), np.int64, len(self._reply))
        counts = np.fromiter(self._reply.values(), np.float32, len(self._reply))
        repeated = np.union1d(self._prompt, reply)
        before = logits[repeated]
        factor = np.float32(options.repetition_penalty)
        logits[repeated] = np.where(before > 0, before / factor, before * factor)
        logits[reply] -= options.presence_penalty + options.frequency_penalty * counts

        in_vocabulary = self._biased < len(logits)
        logits[self._biased[in_vocabulary]] += self._biases[in_vocabulary]
        return logits


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the log-softmax (natural, float64) of logits [..., vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def most_likely(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` largest values, in descending order; ties by index."""
    candidates = _top_candidates(values, count)
    order = np.argsort(-values[candidates], kind="stable")
    best: np.ndarray = candidates[order[:count]]
    return best


def _truncated(logits: np.ndarray, options: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Returns the tokens that remain (None for all), and their unnormalized probabilities."""
    tokens = None
    if 0 < options.top_k < len(logits):
        tokens = most_likely(logits, options.top_k)
        logits = logits[tokens]

    # In place, since allocating 256,000 values takes longer than computing them.
    # The maximum is subtracted before the division, so that a tiny temperature cannot overflow.
    weights = logits.astype(np.float64)
    weights -= weights.max()
    weights /= options.temperature
    np.exp(weights, out=weights)

    if options.top_p < 1:
        remaining = _top_p_indices(weights, options.top_p)
        tokens = _selected(tokens, remaining)
        weights = weights[remaining]
    if options.min_p > 0:
        remaining = np.flatnonzero(weights >= options.min_p * weights.max())
        tokens = _selected(tokens, remaining)
        weights = weights[remaining]
    return tokens, weights


def _selected(tokens: np.ndarray | None, indices: np.ndarray) -> np.ndarray:
    """Returns the tokens at these indices; None stands for the whole vocabulary."""
    return indices if tokens is None else tokens[indices]


def _top_p_indices(weights: np.ndarray, share: float) -> np.ndarray:
    """Returns the indices of the largest weights that reach this share of the sum of all."""
    needed = share * weights.sum()
    count = min(_FIRST_SORTED, len(weights))
    while True:
        largest = most_likely(weights, count)
        sums = weights[largest].cumsum()
        if sums[-1] >= needed or count == len(weights):
            last = int(np.searchsorted(sums, needed))
            indices: np.ndarray = largest[: last + 1]
            return indices
        count = min(8 * count, len(weights))


def _top_candidates(values: np.ndarray, count: int) -> np.ndarray:
    """Returns ascending indices, among which are the indices of the `count` largest values.

    They are the values that reach the `count`-th largest of the maxima of blocks.
    """
    blocks = len(values) // _BLOCK
    if count >= blocks:
        return np.arange(len(values))
    maxima = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(1)
    threshold = np.partition(maxima, blocks - count)[blocks - count]
    return np.flatnonzero(values >= threshold)


def _draw(weights: np.ndarray, point: float) -> int:
    """Draws an index in proportion to its weight, for a `point` that is uniform in [0, 1).

    The cumulative sums of blocks give the block that it falls into, those of its weights the index.
    """
    whole = len(weights) // _BLOCK * _BLOCK
    whole_sums = weights[:whole].reshape(-1, _BLOCK).sum(1)
    block_sums = np.append(whole_sums, weights[whole:].sum())
    cumulative = block_sums.cumsum()

    offset = point * cumulative[-1]
    block = _first_above(cumulative, offset)
    if block:
        offset -= cumulative[block - 1]
    start = block * _BLOCK
    cumulative_in_block = weights[start : start + _BLOCK].cumsum()
    return start + _first_above(cumulative_in_block, offset)


def _first_above(cumulative: np.ndarray, offset: float) -> int:
    """Returns the index of the first sum above `offset`, or of the last positive weight."""
    index = int(np.searchsorted(cumulative, offset, "right"))
    if index < len(cumulative):
        return index
    return int(np.searchsorted(cumulative, cumulative[-1], "left"))
