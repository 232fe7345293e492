"""Token streams and the endless shuffled mixture of training rows made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch
from episodes import Episodes
from tokenizer import BOS
from torch import Tensor

Mixture = dict[str, float]
"""Source → its share of the training tokens."""

# What is nearest to the held-out texts is seen most often.
_TEXTS = {
    "chat": 0.32,
    "austen": 0.30,
    "speeches": 0.13,
    "classics": 0.10,
    "bible": 0.08,
    "wordnet": 0.07,
}
_MEMORY = {
    "memory": 0.40,
    "chat": 0.19,
    "austen": 0.18,
    "speeches": 0.08,
    "classics": 0.06,
    "bible": 0.05,
    "wordnet": 0.04,
}
_CHAT = {
    "chat": 0.58,
    "memory": 0.15,
    "austen": 0.13,
    "speeches": 0.04,
    "classics": 0.04,
    "bible": 0.03,
    "wordnet": 0.03,
}


@dataclass(frozen=True)
class Stage:
    """A part of the training, in which the learning rate falls to zero once.

    Attributes:
        mixture: what is read.
        minutes: by default.
        rate: of the peak learning rates.
    """

    mixture: Mixture
    minutes: float
    rate: float = 1.0


STAGES = {
    "texts": Stage(_TEXTS, 87.0),
    "memory": Stage(_MEMORY, 85.0),
    "chat": Stage(_CHAT, 28.0, 0.4),
}
"""The language; then to remember, too; then small talk, which became worse over that."""

Documents = dict[str, list[np.ndarray]]


def encode(
    processor: sentencepiece.SentencePieceProcessor, texts: dict[str, list[str]]
) -> Documents:
    """Returns the tokens of every document, each after one `<bos>`."""
    return {
        source: [np.array([BOS, *ids], np.int64) for ids in processor.Encode(documents)]
        for source, documents in texts.items()
    }


def prose_rows(
    documents: list[np.ndarray], length: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch of running text: rows of `length` + 1 from a random start, each after `<bos>`."""
    order = rng.permutation(len(documents))
    stream = np.concatenate([documents[i] for i in order])[rng.integers(length) :]
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    rows = np.concatenate((np.full((len(rows), 1), BOS), rows), axis=1)
    return list(rng.permutation(rows))


def chat_rows(
    documents: list[np.ndarray], length: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch of conversations, packed; at least half of the rows open with a whole one.

    What of a conversation does not fit opens the next row, or is left out every other time.
    """
    rows = []
    row = np.empty(0, np.int64)
    for i in rng.permutation(len(documents)):
        row = np.concatenate((row, documents[i]))
        while len(row) > length:
            rows.append(row[: length + 1])
            row = row[length:] if rng.random() < 0.5 else row[:0]
    return [rows[i] for i in rng.permutation(len(rows))]


def epochs(
    source: str, documents: list[np.ndarray], length: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Rows of one source without end."""
    make = chat_rows if source == "chat" else prose_rows
    while True:
        yield from make(documents, length, rng)


def batches(
    mixture: Mixture,
    documents: Documents,
    episodes: Episodes,
    rows: int,
    length: int,
    seed: Sequence[int],
) -> Iterator[Tensor]:
    """Endless [rows, length + 1] batches in the proportions of the mixture."""
    rng = np.random.default_rng(seed)
    streams = [
        episodes.rows(length, rng)
        if source == "memory"
        else epochs(source, documents[source], length, rng)
        for source in mixture
    ]
    shares = np.array(list(mixture.values()))
    shares /= shares.sum()
    drawn = np.zeros(len(shares))
    while True:
        batch = []
        for _ in range(rows):
            # The source that lacks most of its share comes next, so that proportions are exact.
            source = int(np.argmax(shares * (drawn.sum() + 1) - drawn))
            drawn[source] += 1
            batch.append(next(streams[source]))
        yield torch.from_numpy(np.stack(batch))
