"""What a reference file keeps of which position, and the collection of its logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.griffin.tensor import slab_bounds
from rgexport.progress import task
from rgexport.validate.reference.condensed import CODES, LEAST, MOST, condense, log_sum_exp
from rgexport.validate.reference.reference_file import SUMS
from rgexport.validate.reference_pass import ReferenceModel
from rgexport.validate.states import checkpoints
from rgexport.validate.text import Text

LOGITS_BYTES = 17_280_000
"""The file's budget for the logits of all positions. With states and sketches, the demo's file
stays below 20 MB and has 16-bit codes for every token at every position."""
FULL = 64
"""Positions that keep all logits, whatever they take: 64 MB of a 2B. Only these give the exact KL
where its interval is wide, in flat distributions over a large vocabulary."""
LEAST_MOST = 1024
"""Where tails have no codes, a position may keep at least so many tokens, whatever they take."""
WATCHED = 16
"""Positions at which the residual stream is kept: 4 MB of a 2B."""
WATCHED_ENDS = 12
"""Of these, prompts' last positions, at most."""
BLOCK_BYTES = 128 << 20
"""Logits that exist at a time."""

_ITEM = 4
"""Bytes of a logit, and of an id."""


@dataclass(frozen=True)
class Layout:
    """What is kept where; positions count through all prompts, and ascend.

    Attributes:
        full: positions that keep all logits.
        tail_bits: of the other positions' codes, a key of `condensed.CODES`.
        most: tokens that one of the other positions keeps, at most.
        watched: positions at which the residual stream is kept.
        checkpoints: of each prompt, the counts of tokens after which recurrent states are kept.
    """

    full: np.ndarray
    tail_bits: int
    most: int
    watched: np.ndarray
    checkpoints: list[list[int]]


def choose_layout(lengths: Sequence[int], vocab_size: int) -> Layout:
    """What fits into `LOGITS_BYTES`, for prompts of these lengths.

    Full are the prompts' last positions, and others at even distances. Watched are last positions
    too, and others at even distances inside the longest prompt. Only that one has checkpoints.
    """
    longest = int(np.argmax(lengths))
    inside = [checkpoints(n) if i == longest else [] for i, n in enumerate(lengths)]
    full, bits, most = _logits(lengths, vocab_size)
    return Layout(full, bits, most, _watched(lengths, longest), inside)


def _logits(lengths: Sequence[int], vocab_size: int) -> tuple[np.ndarray, int, int]:
    """The full positions, the bits of the others' tails, and how many tokens they keep at most."""
    count = sum(lengths)
    if count * vocab_size * _ITEM <= LOGITS_BYTES:
        return np.arange(count), 0, LEAST
    last = _some(np.cumsum(lengths) - 1, FULL)
    full = _more(last, np.arange(count), FULL)
    each = (LOGITS_BYTES - len(full) * vocab_size * _ITEM) / max(1, count - len(full))
    kept = 2 * _ITEM
    fitting = (bits for bits in (16, 8) if vocab_size * bits // 8 + LEAST * kept <= each)
    bits = next(fitting, 0)
    most = max(int(each - vocab_size * bits // 8) // kept, 0 if bits else LEAST_MOST)
    return full, bits, min(most, MOST, vocab_size)


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


def keep_logits(
    model: ReferenceModel, prompts: Sequence[Text], hidden: Sequence[Any], layout: Layout
) -> dict[str, np.ndarray]:
    """The file's arrays of logits; `hidden` has each prompt's states [1, T, width]."""
    vocab, full = model.config.vocab_size, set(layout.full.tolist())
    count, dtype = sum(len(prompt.tokens) for prompt in prompts), CODES[layout.tail_bits]
    full_logits = np.empty((len(full), vocab), np.float32)
    codes = None if dtype is None else np.empty((count - len(full), vocab), dtype)
    counts, sums = np.zeros(count, np.int64), np.zeros((count, len(SUMS)))
    ids, kept = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for position, (logits, following) in enumerate(_all_logits(model, prompts, hidden, count)):
        row = int(np.searchsorted(layout.full, position))
        wide = logits.astype(np.float64)
        total = log_sum_exp(wide)
        nll = 0.0 if following < 0 else total - float(logits[following])
        sums[position, :3] = total, nll, wide.var()
        if position in full:
            full_logits[row] = logits
            continue
        found = condense(logits, layout.tail_bits, layout.most)
        tail = found.tail
        sums[position, 3:] = tail.mass, tail.offset, tail.moved, tail.floor, tail.step
        counts[position] = len(found.ids)
        ids.append(found.ids)
        kept.append(found.logits)
        if codes is not None:
            codes[position - row] = tail.codes
    arrays: dict[str, np.ndarray] = {
        "full.positions": layout.full.astype(np.int64),
        "full.logits": full_logits,
        "kept.counts": counts,
        "kept.ids": np.concatenate(ids).astype(np.int32),
        "kept.logits": np.concatenate(kept),
        "sums": sums,
    }
    return arrays if codes is None else arrays | {"codes": codes}


def _all_logits(
    model: ReferenceModel, prompts: Sequence[Text], hidden: Sequence[Any], count: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Each position's logits [vocab] and the token that follows, -1 at the end of a prompt."""
    row_bytes = 4 * model.config.vocab_size
    with task("Keeping logits", count, "tokens") as advance:
        for prompt, states in zip(prompts, hidden, strict=True):
            following = [*prompt.tokens[1:].tolist(), -1]
            for start, stop in slab_bounds(len(following), row_bytes, BLOCK_BYTES):
                block = model.logits(states[:, start:stop])[0]
                for logits, token in zip(block, following[start:stop], strict=True):
                    yield logits, token
                    advance(1)
