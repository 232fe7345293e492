"""Rows of the tasks of `rgexport evaluate --suite memory`.

Something is told, a text follows, and the questions come with their answers.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizer import BOS

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.evaluation.suites.episodes import TASKS, Episode, EpisodeVocabulary, vocabulary_of

_NEAR = 0.6
"""Share of the episodes that are asked about at once, or after a few tokens."""
_FEW = 24


class Episodes:
    """Makes rows; half of the episodes use the words of the suite, half any whole words."""

    def __init__(self, tokenizer: Path, texts: list[np.ndarray]):
        """`tokenizer` is its folder; texts are what lies between telling and asking."""
        found = load_tokenizer(tokenizer)
        self._words = vocabulary_of(found, found.vocab_size)
        pieces = [
            found.surface(token).decode("utf-8", "ignore") for token in range(found.vocab_size)
        ]
        whole = [t for t, p in enumerate(pieces) if p.startswith(" ") and p[1:].isalpha()]
        self._whole = np.setdiff1d(whole, self._words.symbols)
        self._texts = np.concatenate(texts)

    def rows(self, length: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yields rows of `length` + 1 without end; each begins with `<bos>`."""
        while True:
            row = [BOS]
            while len(row) <= length:
                row += self._episode(length, rng)
            yield np.array(row[: length + 1], np.int64)

    def _episode(self, length: int, rng: np.random.Generator) -> list[int]:
        task = list(TASKS.values())[rng.integers(len(TASKS))]
        words = self._some_words(rng)
        episode = task(words, rng)
        if rng.random() < _NEAR:
            distance = int(rng.integers(_FEW))
        else:
            distance = int(np.exp(rng.uniform(np.log(16), np.log(length))))
        start = rng.integers(len(self._texts) - distance)
        between = self._texts[start : start + distance].tolist()
        return [*episode.facts, *between, *_asked(episode), *words.end]

    def _some_words(self, rng: np.random.Generator) -> EpisodeVocabulary:
        if rng.random() < 0.5:
            return self._words
        return replace(self._words, symbols=rng.choice(self._whole, 64, replace=False).tolist())


def _asked(episode: Episode) -> list[int]:
    return [token for q in episode.questions for token in [*q.prompt, q.answer]]
