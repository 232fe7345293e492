"""A calibration text: sequences of tokens, each read from a fresh state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.files.paths import require_regular

LENGTH = 512
"""Tokens of a sequence: enough context to show the effect of int4, and many sequences per text."""
_LONGEST_TOKEN = 32
"""Most characters of a token; a file is read up to so many per token."""


@dataclass(frozen=True)
class Passages:
    """Sequences one after another: `tokens` int32 [N], and the `lengths` int32 [S] of each."""

    tokens: np.ndarray
    lengths: np.ndarray

    def sequences(self) -> list[np.ndarray]:
        """Returns the tokens of each sequence."""
        return np.split(self.tokens, self.lengths.cumsum()[:-1])

    def first(self, tokens: int) -> "Passages":
        """Returns the first sequences, at least one, with at most so many tokens together."""
        count = max(1, int(np.searchsorted(self.lengths.cumsum(), tokens, side="right")))
        lengths = self.lengths[:count]
        return Passages(self.tokens[: lengths.sum()], lengths)

    def without_last(self, count: int) -> tuple["Passages", "Passages"]:
        """Splits off the last `count` sequences; returns the others first."""
        split = len(self.lengths) - count
        end = self.lengths[:split].sum()
        return (
            Passages(self.tokens[:end], self.lengths[:split]),
            Passages(self.tokens[end:], self.lengths[split:]),
        )

    def batches(self, most: int) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Yields neighbouring sequences of equal length: a slice of the tokens, and their shape.

        The shape is (sequences, tokens of each), with at most `most` tokens or one sequence.
        """
        first, start = 0, 0
        while first < len(self.lengths):
            length = int(self.lengths[first])
            equal = int(np.argmin(np.append(self.lengths[first:] == length, False)))
            count = min(equal, max(1, most // length))
            yield slice(start, start + count * length), (count, length)
            first, start = first + count, start + count * length


def join(sequences: Sequence[np.ndarray], seed: int) -> Passages:
    """Joins sequences in a random order, so that the first ones represent all."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    mixed = [sequences[i] for i in order]
    lengths = np.array([len(sequence) for sequence in mixed], np.int32)
    return Passages(np.concatenate(mixed).astype(np.int32), lengths)


def read_text(file: Path, tokenizer: Tokenizer, limit: int) -> list[np.ndarray]:
    """Reads the beginning of a text as sequences, each after a bos, `limit` tokens in all.

    Raises:
        RequestError: the file cannot be read, or is empty.
    """
    ids = tokenizer.encode_text(_characters(file, _LONGEST_TOKEN * limit))
    if not ids:
        raise RequestError(f"{file} has no text in it; expected a UTF-8 text to calibrate on")
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    step = LENGTH - len(begin)
    pieces = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    cut = first_tokens([np.array(piece) for piece in pieces], limit)
    return [piece for piece in cut if len(piece) > len(begin)] or cut[:1]


def first_tokens(sequences: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Returns the first `limit` tokens of sequences; the last sequence is cut."""
    starts = accumulate((len(sequence) for sequence in sequences), initial=0)
    cut = (s[: max(0, limit - start)] for s, start in zip(sequences, starts, strict=False))
    return [sequence for sequence in cut if len(sequence)]


def _characters(file: Path, most: int) -> str:
    try:
        require_regular(file)
        with file.open(encoding="utf-8") as opened:
            return opened.read(most)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {file} as UTF-8 text: {error}") from None
