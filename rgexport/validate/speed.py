"""How fast an artifact runs, in a few seconds; `rgexport bench` measures more closely."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.progress import task
from rgexport.runtimes.bench.roofline import seconds
from rgexport.runtimes.engine import open_session

PROMPT = 128
"""Tokens of a prompt, for an engine that takes chunks of any length."""
SECONDS = 2.0
"""Length of each of the three parts. The first one warms up: engines get huge pages meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second from an empty state, each of the median call.

    Attributes:
        decode: one token at a time.
        prefill: a prompt of `prompt_tokens`.
        prompt_tokens: 128, or a chunk where chunks are of a fixed length.
    """

    decode: float
    prefill: float
    prompt_tokens: int


def measure_speed(artifact: Artifact) -> Speed:
    """Measures random tokens in a session of its own: at least two steps and one prompt.

    Raises:
        RequestError: the engine is missing or cannot open the model.
    """
    session, generator = open_session(artifact), np.random.default_rng(0)
    length = session.info.prefill_chunk if session.info.whole_chunks else PROMPT

    def step() -> None:
        session.step(generator.integers(0, session.vocab_size, 1))

    def prompt() -> None:
        session.reset()
        session.prefill(generator.integers(0, session.vocab_size, (1, length)))

    try:
        with task("Measuring the speed", 3, "parts") as advance:
            _median_seconds(step)
            advance(1)
            session.reset()
            decode = 1 / _median_seconds(step)
            advance(1)
            prefill = length / _median_seconds(prompt)
            advance(1)
    finally:
        session.close()
    return Speed(decode=decode, prefill=prefill, prompt_tokens=length)


def _median_seconds(run: Callable[[], None]) -> float:
    """The median of at least one call, and of as many as there is time for."""
    took = [seconds(run)]
    while sum(took) < SECONDS:
        took.append(seconds(run))
    return median(took)
