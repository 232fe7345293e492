"""What a reference file keeps of which position, for prompts of given lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.validate.reference import condensed
from rgexport.validate.states import checkpoints

LOGITS_BYTES = 17_280_000
"""What the file should take for logits, all positions together: with states and sketches, the
demo's is below 20 MB and has 16 bits for every token everywhere."""
FULL = 64
"""Positions that keep all logits, or a few less, whatever they take: 64 MB of a 2B. They alone
tell KL as such where its interval is wide, in flat distributions over a large vocabulary."""
LEAST_MOST = 1024
"""Where tails have no codes, the limit of kept tokens is no lower than this, whatever it takes."""
WATCHED = 16
"""Positions at which the residual stream is kept: 4 MB of a 2B."""
WATCHED_ENDS = 12
"""Of these, prompts' last positions, at most."""

_ITEM = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class Layout:
    """Positions are those of all prompts, one behind another; they ascend."""

    full: np.ndarray
    """Those that keep all logits."""
    tail_bits: int
    most: int
    """Kept tokens of a position, at most."""
    watched: np.ndarray
    """Those at which the residual stream is kept."""
    checkpoints: list[list[int]]
    """Of each prompt, counts of tokens behind which the recurrent states are kept."""


def choose_layout(lengths: Sequence[int], vocab_size: int) -> Layout:
    """What fits into `LOGITS_BYTES`, for prompts of these lengths.

    Full are the last positions of the prompts, and others at even distances. Watched are the last
    positions too, and others at even distances inside the longest prompt, which alone has
    checkpoints.
    """
    longest = int(np.argmax(lengths))
    inside = [checkpoints(n) if i == longest else [] for i, n in enumerate(lengths)]
    full, bits, most = _logits(lengths, vocab_size)
    return Layout(full, bits, most, _watched(lengths, longest), inside)


def _logits(lengths: Sequence[int], vocab_size: int) -> tuple[np.ndarray, int, int]:
    """The full positions, the bits of the others' tails, and how many tokens they keep at most."""
    count = sum(lengths)
    if count * vocab_size * _ITEM <= LOGITS_BYTES:
        return np.arange(count), 0, condensed.LEAST
    last = _some(np.cumsum(lengths) - 1, FULL)
    full = _more(last, np.arange(count), FULL)
    each = (LOGITS_BYTES - len(full) * vocab_size * _ITEM) / max(1, count - len(full))
    kept = 2 * _ITEM  # an id and a logit
    fitting = (bits for bits in (16, 8) if vocab_size * bits // 8 + condensed.LEAST * kept <= each)
    bits = next(fitting, 0)
    most = max(int(each - vocab_size * bits // 8) // kept, 0 if bits else LEAST_MOST)
    return full, bits, min(most, condensed.MOST, vocab_size)


def _watched(lengths: Sequence[int], longest: int) -> np.ndarray:
    ends = np.cumsum(lengths)
    inside = np.arange(ends[longest] - lengths[longest], ends[longest])
    return _more(_some(ends - 1, WATCHED_ENDS), inside, WATCHED)


def _more(chosen: np.ndarray, positions: np.ndarray, most: int) -> np.ndarray:
    """The chosen ones and some of the others, `most` in all; ascending."""
    others = np.setdiff1d(positions, chosen)
    return np.union1d(chosen, _some(others, most - len(chosen)))


def _some(positions: np.ndarray, most: int) -> np.ndarray:
    """All of them, or `most` of them at even distances."""
    count = min(most, len(positions))
    return positions[np.linspace(0, len(positions) - 1, count).round().astype(np.int64)]
