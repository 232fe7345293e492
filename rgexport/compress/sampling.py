"""Samples text from the model itself, which calibrates better than most other text.

Each sequence begins with a bos and a random token: after a bos alone, a model writes too few kinds
of text. An ONNX export in float32, or in int4 for large models, writes the text and is removed
afterwards. Statistics are those of the original on that text.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rgexport.chat.sampling import Sampler, Sampling
from rgexport.chat.tokenizer import Tokenizer
from rgexport.compress.passages import LENGTH
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import float32_bytes
from rgexport.progress import group, task

_BATCH = 16
"""Sequences that are sampled together; each weight is read once for all."""
_LARGEST_IN_FLOAT32 = 2 << 30
"""Most bytes of float32 weights; a larger model is sampled in int4."""

Step = Callable[[np.ndarray], np.ndarray]
"""Takes the next tokens [B, t] of sequences, the first time from their beginning; returns logits
[B, vocab] of the last."""


def sample(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    count: int,
    *,
    seed: int,
    folder: Path,
) -> list[np.ndarray]:
    """Samples sequences of `count` tokens together; the export lies in `folder` meanwhile."""
    rng = np.random.default_rng(seed)
    starts = first_tokens(tokenizer, checkpoint.config.vocab_size, -(-count // LENGTH), rng)
    sequences: list[np.ndarray] = []
    with (
        group("Sampling text from the model"),
        _engine(checkpoint, folder) as begin,
        task("Sampling text", len(starts) * LENGTH, "tokens") as advance,
    ):
        for first in range(0, len(starts), _BATCH):
            batch = starts[first : first + _BATCH]
            sampler = Sampler(Sampling(temperature=1.0, seed=int(rng.integers(1 << 31))))
            step = begin(len(batch))
            sequences += _continue(step, batch, min(LENGTH, count), sampler, advance)
    sizes = np.minimum(LENGTH, count - LENGTH * np.arange(len(sequences)))
    return [ids[:size] for ids, size in zip(sequences, sizes, strict=True)]


def first_tokens(
    tokenizer: Tokenizer | None, vocab_size: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a bos, if there is one, and a random ordinary token, [count, 1 or 2]."""
    special = set() if tokenizer is None else {*tokenizer.special.values()}
    size = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
    ordinary = np.setdiff1d(np.arange(size), list(special))
    drawn = rng.choice(ordinary if len(ordinary) else np.arange(size), (count, 1))
    bos = None if tokenizer is None else tokenizer.bos_id
    return drawn if bos is None else np.concatenate([np.full((count, 1), bos), drawn], 1)


def _continue(
    step: Step, starts: np.ndarray, length: int, sampler: Sampler, advance: Callable[[int], None]
) -> list[np.ndarray]:
    """Samples sequences [B, length] that begin with `starts`."""
    ids = np.zeros((len(starts), max(length, starts.shape[1])), np.int64)
    ids[:, : starts.shape[1]] = starts
    following = starts
    advance(starts.size)
    for position in range(starts.shape[1], length):
        logits = step(following)
        ids[:, position] = [sampler(row) for row in logits]
        following = ids[:, position : position + 1]
        advance(len(ids))
    return list(ids)


@contextmanager
def _engine(checkpoint: Checkpoint, folder: Path) -> Iterator[Callable[[int], Step]]:
    """Exports the model and yields a function that starts a batch of sequences.

    The window is at most as long as a sequence, which saves memory for states.
    """
    from rgexport.export.onnx.exporter import export_onnx
    from rgexport.export.onnx.profiles import OnnxOptions
    from rgexport.export.opening import open_artifact
    from rgexport.runtimes.engine import open_session

    config = checkpoint.config
    short = dataclasses.replace(config, window=min(config.window, LENGTH))
    small = float32_bytes(config) <= _LARGEST_IN_FLOAT32
    shutil.rmtree(folder, ignore_errors=True)
    smallest = OnnxOptions(precision="int4", block_size=128, embedding_precision="int4")
    options = OnnxOptions(precision="fp32") if small else smallest
    export_onnx(dataclasses.replace(checkpoint, config=short), options, folder)
    session = open_session(open_artifact(folder))

    def begin(batch: int) -> Step:
        session.reset(batch)
        return lambda tokens: session.prefill(tokens)[:, 0]

    try:
        yield begin
    finally:
        session.close()
        shutil.rmtree(folder, ignore_errors=True)
