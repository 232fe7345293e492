"""Continuing a sequence of tokens."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.runtimes.session import Session


@dataclass
class GenerationStats:
    """The costs of one generation; seconds exclude the time that its consumer takes."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    steps: int = 0
    """Calls of `Session.step`: one fewer than the tokens that were sampled."""
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, 0 if there were none."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Steps per second, sampling included; 0 if there were none."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a plain prompt: BOS, if the vocabulary has it, and the text.

    Raises:
        RequestError: there are none.
    """
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode_text(text)
    if not ids:
        raise RequestError("the prompt is empty and the tokenizer has no <bos>; give a prompt")
    return ids


def prefill(session: Session, ids: Sequence[int], stats: GenerationStats) -> np.ndarray:
    """Feeds `ids` (at least one) to a session of one conversation; logits [vocab] of the last.

    Raises:
        RequestError: an id that the model does not have.
    """
    if max(ids) >= session.vocab_size:
        raise RequestError(
            f"there is no token id {max(ids)}: the model has {session.vocab_size} tokens; "
            "expected ids below that, from the model's own tokenizer"
        )
    started = time.perf_counter()
    logits: np.ndarray = session.prefill(np.array([ids], np.int64))[0, -1]
    stats.prompt_tokens += len(ids)
    stats.prefill_seconds += time.perf_counter() - started
    return logits


def decode(
    session: Session,
    logits: np.ndarray,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: Collection[int],
    stats: GenerationStats,
) -> Iterator[int]:
    """Yields tokens that continue `logits` [vocab], at most `max_new_tokens`, no stop id.

    A token is fed to the session when the next one is asked for, so the last one yielded is
    not in the state unless a stop id ended the sequence.
    """
    token = sampler(logits)
    for left in reversed(range(max_new_tokens)):
        if token in stop_ids:
            return
        stats.new_tokens += 1
        yield token
        if left:
            started = time.perf_counter()
            token = sampler(session.step(np.array([token], np.int64))[0])
            stats.steps += 1
            stats.decode_seconds += time.perf_counter() - started


def generate(
    session: Session,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: Collection[int],
    stats: GenerationStats | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow `prompt_ids` in a session of one conversation.

    The session continues from its state: `reset` it for a new text. `stats` is filled meanwhile.
    """
    stats = stats or GenerationStats()
    logits = prefill(session, prompt_ids, stats)
    yield from decode(session, logits, sampler, max_new_tokens, stop_ids, stats)
