"""What `rgexport bench` is asked to measure."""

import re
from dataclasses import dataclass
from typing import Any, Self

from rgexport.errors import RequestError
from rgexport.runtimes.session import SessionInfo

MOST = 1 << 24
"""The largest length or depth."""
PIECE = 512
"""Tokens of a prompt at a time, on the way to a depth and for warming up."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure; each depth with each prompt length and each number of tokens."""

    prompts: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5
    synthetic: bool = False
    """Whether a depth is a state of random numbers instead of tokens that were processed."""

    def __post_init__(self) -> None:
        """Lengths of 0 stand for none.

        Raises:
            RequestError: nothing to measure.
        """
        if not any((*self.prompts, *self.tokens)):
            raise RequestError("there is nothing to measure: -p and -n are 0; give one a length")

    @classmethod
    def parse(cls, prompts: str, tokens: str, depths: str, **rest: Any) -> Self:
        """A request whose lists are texts such as `128,512`.

        Raises:
            RequestError: a text that is no list of lengths, or nothing to measure.
        """
        return cls(_lengths("-p", prompts), _lengths("-n", tokens), _lengths("-d", depths), **rest)

    @property
    def trials(self) -> list["Trial"]:
        """Prompts first, in the order asked for."""
        prompts = [Trial("pp", length) for length in self.prompts if length]
        return prompts + [Trial("tg", length) for length in self.tokens if length]


@dataclass(frozen=True)
class Trial:
    """A prompt of `length` tokens (`pp`), or as many tokens one by one (`tg`)."""

    kind: str
    length: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: `pp512`."""
        return f"{self.kind}{self.length}"

    @property
    def warm_up(self) -> int:
        """A length after which an engine has allocated what it needs."""
        return min(self.length, PIECE) if self.kind == "pp" else 1

    def readings(self, info: SessionInfo) -> int:
        """How often the engine reads all weights."""
        if self.kind != "pp":
            return self.length
        chunks, rest = divmod(self.length, info.prefill_chunk)
        return chunks + (rest if info.whole_chunks else min(rest, 1))


def _lengths(option: str, text: str) -> tuple[int, ...]:
    """The numbers of a list, each once."""
    words = text.split(",")
    if not all(re.fullmatch("[0-9]{1,8}", word) and int(word) <= MOST for word in words):
        raise RequestError(
            f"{option} is {text!r}; expected numbers from 0 to {MOST}, such as 512 or 128,512"
        )
    return tuple(dict.fromkeys(map(int, words)))
