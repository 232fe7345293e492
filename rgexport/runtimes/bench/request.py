"""The lengths and depths that a benchmark measures, from the command line's lists."""

import re
from dataclasses import dataclass
from typing import Any, Self

from rgexport.errors import RequestError
from rgexport.runtimes.session import SessionInfo

MOST = 1 << 24
"""The largest length, and the largest depth."""


@dataclass(frozen=True)
class BenchTest:
    """A prompt of `length` tokens (`pp`), or as many tokens one by one (`tg`)."""

    kind: str
    length: int

    @property
    def name(self) -> str:
        """The name that llama-bench gives the test, such as `pp512`."""
        return f"{self.kind}{self.length}"

    def weight_reads(self, info: SessionInfo) -> int:
        """Returns how often the test reads all weights of a session."""
        if self.kind != "pp":
            return self.length
        chunks, remainder = divmod(self.length, info.prefill_chunk)
        if info.whole_chunks:  # the remaining tokens are taken one by one
            return chunks + remainder
        return chunks + min(remainder, 1)


@dataclass(frozen=True)
class BenchRequest:
    """Lengths to measure at each depth; if `synthetic`, random numbers are the depth's state."""

    prompts: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5
    synthetic: bool = False

    def __post_init__(self) -> None:
        if not any((*self.prompts, *self.tokens)):
            raise RequestError("there is nothing to measure: -p and -n are 0; give one a length")
        if self.synthetic and not any(self.depths):
            raise RequestError("--synthetic changes nothing at depth 0; give one, such as -d 4096")

    @classmethod
    def parse(cls, prompts: str, tokens: str, depths: str, **options: Any) -> Self:
        """Makes a request from lists such as `128,512`; `options` are the other fields.

        Raises RequestError if a list has anything but numbers up to `MOST`.
        """
        return cls(
            _lengths("-p", prompts), _lengths("-n", tokens), _lengths("-d", depths), **options
        )

    @property
    def tests(self) -> list[BenchTest]:
        """The tests of each depth: prompts, then single tokens; a length of 0 has none."""
        prompts = [BenchTest("pp", length) for length in self.prompts if length]
        tokens = [BenchTest("tg", length) for length in self.tokens if length]
        return prompts + tokens


def _lengths(option: str, text: str) -> tuple[int, ...]:
    """Returns the different numbers of a list, in its order."""
    numbers = text.split(",")
    # No more than 8 digits, as Python refuses to convert very long texts.
    if not all(re.fullmatch("[0-9]{1,8}", number) and int(number) <= MOST for number in numbers):
        raise RequestError(
            f"{option} is {text!r}; expected numbers from 0 to {MOST}, such as 512 or 128,512"
        )
    lengths = [int(number) for number in numbers]
    return tuple(dict.fromkeys(lengths))
