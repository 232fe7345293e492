"""Calibration texts: sequences of tokens, each read from a fresh state.

Text sampled from the model itself calibrates better than most other text. Each sampled sequence
begins with a bos and a random token: after a bos alone, a model writes too few kinds of text. An
ONNX export in float32, or in int4 for large models, writes the text and is removed afterwards.
Statistics are those of the original on that text.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from rgexport.chat.sampling import Sampler, Sampling
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.files.paths import require_regular
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import float32_bytes
from rgexport.progress import Advance, group, task
from rgexport.runtimes.session import Session

LENGTH = 512
"""Tokens of a sequence: enough context to show the effect of int4, and many sequences per text."""
_LONGEST_TOKEN = 32  # most characters of a token; a file is read up to so many per token
_BATCH = 16  # sequences that are sampled together; each weight is read once for all
_LARGEST_IN_FLOAT32 = 2 << 30  # most bytes of float32 weights; a larger model is sampled in int4


@dataclass(frozen=True)
class Passages:
    """Sequences one after another: `tokens` int32 [N], and the `lengths` int32 [S] of each."""

    tokens: np.ndarray
    lengths: np.ndarray

    def sequences(self) -> list[np.ndarray]:
        return np.split(self.tokens, self.lengths.cumsum()[:-1])

    def first(self, tokens: int) -> "Passages":
        """Returns the first sequences, at least one, with at most so many tokens together."""
        count = max(1, int(np.searchsorted(self.lengths.cumsum(), tokens, side="right")))
        lengths = self.lengths[:count]
        return Passages(self.tokens[: lengths.sum()], lengths)

    def without_last(self, count: int) -> tuple["Passages", "Passages"]:
        """Splits off the last `count` sequences; returns the others first."""
        lengths = np.split(self.lengths, [len(self.lengths) - count])
        first, last = map(Passages, np.split(self.tokens, [lengths[0].sum()]), lengths)
        return first, last

    def batches(self, most: int) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Yields sequences of equal length in a row: a slice of the tokens, (sequences, length).

        Together they have at most `most` tokens, or are one sequence.
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
    mixed = [sequences[i] for i in np.random.default_rng(seed).permutation(len(sequences))]
    lengths = np.array([len(sequence) for sequence in mixed], np.int32)
    return Passages(np.concatenate(mixed).astype(np.int32), lengths)


def read_text(file: Path, tokenizer: Tokenizer, limit: int) -> list[np.ndarray]:
    """Reads the beginning of a text as sequences, each after a bos, `limit` tokens in all."""
    try:
        require_regular(file)
        with file.open(encoding="utf-8") as opened:
            text = opened.read(_LONGEST_TOKEN * limit)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {file} as UTF-8 text: {error}") from None
    ids = tokenizer.encode_text(text)
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


def sample(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, count: int, *, seed: int, folder: Path
) -> list[np.ndarray]:
    """Samples sequences of `count` tokens together; the export lies in `folder` meanwhile."""
    rng = np.random.default_rng(seed)
    starts = _random_starts(tokenizer, checkpoint.config.vocab_size, -(-count // LENGTH), rng)
    sequences: list[np.ndarray] = []
    with (
        group("Sampling text from the model"),
        _engine(checkpoint, folder) as session,
        task("Sampling text", len(starts) * LENGTH, "tokens") as advance,
    ):
        for first in range(0, len(starts), _BATCH):
            batch = starts[first : first + _BATCH]
            sampler = Sampler(Sampling(temperature=1.0, seed=int(rng.integers(1 << 31))))
            sequences += _continue(session, batch, min(LENGTH, count), sampler, advance)
    sizes = np.minimum(LENGTH, count - LENGTH * np.arange(len(sequences)))
    return [ids[:size] for ids, size in zip(sequences, sizes, strict=True)]


def _random_starts(
    tokenizer: Tokenizer | None, vocab_size: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a bos, if there is one, and a random ordinary token, [count, 1 or 2]."""
    if tokenizer is None:
        return rng.choice(np.arange(vocab_size), (count, 1))
    ids, bos = np.arange(min(vocab_size, tokenizer.vocab_size)), tokenizer.bos_id
    ordinary = np.setdiff1d(ids, list(tokenizer.special.values()))
    drawn = rng.choice(ordinary if len(ordinary) else ids, (count, 1))
    return drawn if bos is None else np.concatenate([np.full((count, 1), bos), drawn], 1)


def _continue(
    session: Session, starts: np.ndarray, length: int, sampler: Sampler, advance: Advance
) -> list[np.ndarray]:
    ids = np.zeros((len(starts), max(length, starts.shape[1])), np.int64)
    ids[:, : starts.shape[1]] = starts
    following = starts
    session.reset(len(starts))
    advance(starts.size)
    for position in range(starts.shape[1], length):
        ids[:, position] = [sampler(row) for row in session.prefill(following)[:, 0]]
        following = ids[:, position : position + 1]
        advance(len(ids))
    return list(ids)


@contextmanager
def _engine(checkpoint: Checkpoint, folder: Path) -> Iterator[Session]:
    from rgexport.artifacts.opening import open_artifact
    from rgexport.export.onnx.exporter import export_onnx
    from rgexport.export.onnx.profiles import OnnxOptions
    from rgexport.runtimes.engine import open_session

    config = checkpoint.config
    short = replace(config, window=min(config.window, LENGTH))
    small = float32_bytes(config) <= _LARGEST_IN_FLOAT32
    shutil.rmtree(folder, ignore_errors=True)
    smallest = OnnxOptions(precision="int4", block_size=128, embedding_precision="int4")
    options = OnnxOptions(precision="fp32") if small else smallest
    export_onnx(replace(checkpoint, config=short), options, folder)
    session = open_session(open_artifact(folder))
    try:
        yield session
    finally:
        session.close()
        shutil.rmtree(folder, ignore_errors=True)
