"""How fast an artifact runs, in a few seconds: enough to compare; `rgexport bench` tells more."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.progress import task
from rgexport.runtimes.bench.roofline import seconds
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session

PROMPT = 128
"""Tokens of a prompt, of an engine that takes chunks of any length."""
SECONDS = 2.0
"""Of each of the three parts: the first one warms up, as engines get huge pages meanwhile."""


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
    """Measures in a session of its own, which is closed at the end.

    However slow the engine is, it takes two tokens and one prompt.

    Raises:
        RequestError: the engine is missing or cannot open the model.
    """
    session = open_session(artifact)
    try:
        with task("Measuring the speed", 3, "parts") as advance:
            measuring = _Measuring(session)
            measuring.calls(measuring.step)
            advance(1)
            session.reset()
            step = median(measuring.calls(measuring.step))
            advance(1)
            prompt = median(measuring.calls(measuring.prompt))
            advance(1)
    finally:
        session.close()
    length = measuring.length
    return Speed(decode=1 / step, prefill=length / prompt, prompt_tokens=length)


class _Measuring:
    """A session that takes random tokens."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._generator = np.random.default_rng(0)
        info = session.info
        self.length = info.prefill_chunk if info.whole_chunks else PROMPT

    def step(self) -> None:
        """Takes one token."""
        self._session.step(self._random(1)[0])

    def prompt(self) -> None:
        """Takes a prompt from the beginning."""
        self._session.reset()
        self._session.prefill(self._random(self.length))

    def calls(self, run: Callable[[], None]) -> list[float]:
        """Seconds of each call: at least one, and as many as there is time for."""
        took = [seconds(run)]
        while sum(took) < SECONDS:
            took.append(seconds(run))
        return took

    def _random(self, count: int) -> np.ndarray:
        return self._generator.integers(0, self._session.vocab_size, (1, count))
