"""The length of chunks: prompts are read beside replies, which must not wait long."""

from rgexport.runtimes.session import Session

_CHUNKS = 16, 512
"""Fewest and most tokens that are read at once."""
_TILE = 64
"""Chunks are multiples of this if they can be: engines are slower at fewer tokens."""
_READING_SECONDS, _READING_STEPS = 2.5, 1.5
"""How long a chunk may take: alone, and in steps if others write."""


class Pace:
    """How many tokens to read at once, so that no one who writes waits long."""

    def __init__(self, session: Session) -> None:
        info = session.info
        self._unit = info.prefill_chunk if info.whole_chunks else _CHUNKS[0]
        self._token_seconds = self._step_seconds = 0.0

    def read(self, tokens: int, seconds: float) -> None:
        """Notes how long a chunk took."""
        if tokens >= _CHUNKS[0]:
            self._token_seconds = _mean(self._token_seconds, seconds / tokens)

    def step(self, seconds: float) -> None:
        """Notes how long a step took."""
        self._step_seconds = _mean(self._step_seconds, seconds)

    def chunk(self, *, alone: bool) -> int:
        """Most tokens of the next chunk."""
        seconds = _READING_SECONDS if alone else _READING_STEPS * self._step_seconds
        if not self._token_seconds:
            return self._unit * 4
        fitting = int(seconds / self._token_seconds)
        unit = self._unit * max(1, _TILE // self._unit) if fitting >= _TILE else self._unit
        return max(self._unit, min(fitting // unit * unit, _CHUNKS[1]))


def _mean(before: float, now: float) -> float:
    """A mean in which older figures count less and less."""
    return now if not before else 0.8 * before + 0.2 * now
