"""Replies as text: options, pieces, stop strings, and the stream of a reply."""

import queue
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from rgexport.chat.jobs import End, GenerationJob, GenerationOptions, Reason
from rgexport.chat.reading import show_reading
from rgexport.chat.sampling import Sampling, log_probabilities, most_likely
from rgexport.chat.tokenizer import StreamDecoder, Tokenizer
from rgexport.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ReplyOptions(GenerationOptions):
    """Options of a reply as a text, which ends before any of `stop`.

    Attributes:
        logprobs: number of the most likely tokens whose log probabilities are reported beside the
            chosen token's; None reports none.
        prompt_logprobs: whether the first piece also has the prompt's tokens, with their log
            probabilities. The whole prompt is read then.
    """

    max_new_tokens: int = 1024
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if isinstance(self.stop, str):
            raise RequestError(f"stop is {self.stop!r}; expected a list of texts")


def reply_options(**options: Any) -> ReplyOptions:
    """Returns options by name; RequestError for an unknown name, or a value out of range."""
    reply_names = {field.name for field in fields(ReplyOptions)} - {"sampling"}
    values = {name: options.pop(name) for name in reply_names & options.keys()}
    if isinstance(values.get("draft"), str):
        raise RequestError("draft is a text; expected its tokens, as Model.draft_of gives them")
    sampling_names = {field.name for field in fields(Sampling)}
    if unknown := sorted(options.keys() - sampling_names):
        raise RequestError(
            f"there is no option {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(sampling_names | reply_names))}"
        )
    try:
        return ReplyOptions(sampling=Sampling(**options), **values)
    except TypeError as error:
        raise RequestError(f"an option has a value of the wrong type: {error}") from None


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log probability (None for a prompt's first), and the most likely ones."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TextPiece:
    """Text of a reply, perhaps "", and the tokens since the last piece if they were asked for."""

    text: str
    tokens: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelReply:
    """A complete reply, and why it ended.

    `cached_tokens` of `prompt_tokens` had a known state. `read_seconds` last from admission to the
    first token, `write_seconds` from there to the end.
    """

    text: str
    ids: tuple[int, ...]
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    read_seconds: float
    write_seconds: float

    @property
    def new_tokens(self) -> int:
        return len(self.ids)

    @property
    def read_rate(self) -> float:
        """Prompt tokens per second, without cached ones; 0 if there were none."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.read_seconds if self.read_seconds else 0.0

    @property
    def write_rate(self) -> float:
        """Tokens per second after the first one; 0 if there were none."""
        return (self.new_tokens - 1) / self.write_seconds if self.new_tokens > 1 else 0.0


Item = TextPiece | ModelReply | RequestError
Deliver = Callable[[Item], None]
"""Takes the pieces of a reply, then the reply or an error; called in another thread."""


class StopStrings:
    """Ends a text at a stop string (`match`); holds back its end while one may begin there."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.match: str | None = None

    def add(self, piece: str) -> str:
        if self.match is not None:
            return ""
        text = self._held + piece
        ends = ((text.index(stop), -len(stop), stop) for stop in self._stops if stop in text)
        if first := min(ends, default=None):
            self.match, self._held = first[2], ""
            return text[: first[0]]
        sure = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[sure:]
        return text[:sure]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class ReplyWriter:
    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], options: ReplyOptions, deliver: Deliver
    ) -> None:
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(options.stop)
        self._prompt_tokens, self._logprobs = len(prompt), options.logprobs
        self._deliver = deliver
        self._texts: list[str] = []
        self._undelivered = [ScoredToken(prompt[0], None, ())] if options.prompt_logprobs else []
        self._ids: list[int] = []

    def token(self, token: int, logits: np.ndarray) -> bool:
        self._ids.append(token)
        if self._logprobs is not None:
            self._undelivered.append(_scored(token, logits, self._logprobs))
        self._add(self._stop.add(self._decoder.add(token)))
        return self._stop.match is None

    def prompt(self, ids: Sequence[int], logits: np.ndarray) -> None:
        for token, row in zip(ids, logits, strict=True):
            self._undelivered.append(_scored(token, row, self._logprobs or 0))

    def end(self, end: End) -> None:
        self._add(self._stop.add(self._decoder.finish()) + self._stop.finish(), last=True)
        if end.error is not None:
            self._deliver(end.error)
            return
        self._deliver(
            ModelReply(
                text="".join(self._texts),
                ids=tuple(self._ids),
                reason=end.reason if self._stop.match is None else "stop",
                prompt_tokens=self._prompt_tokens,
                cached_tokens=end.cached_tokens,
                read_seconds=end.read_seconds,
                write_seconds=end.write_seconds,
            )
        )

    def _add(self, text: str, *, last: bool = False) -> None:
        if text or (last and self._undelivered):
            self._texts.append(text)
            self._deliver(TextPiece(text, tuple(self._undelivered)))
            self._undelivered = []


def _scored(token: int, logits: np.ndarray, count: int) -> ScoredToken:
    values = log_probabilities(logits)
    top = most_likely(logits, count) if count else ()
    best = tuple((int(i), float(values[i])) for i in top)
    return ScoredToken(token, float(values[token]), best)


class ReplyStream(Iterator[str]):
    """The pieces of a reply as they come, and their `text`; garbage collection cancels it."""

    def __init__(
        self, start: Callable[[Deliver], GenerationJob], *, shows_reading: bool = False
    ) -> None:
        self.text = ""
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._job = start(self._items.put)
        self._shows_reading = shows_reading
        self._end: ModelReply | RequestError | None = None
        weakref.finalize(self, self._job.cancel).atexit = False

    def __repr__(self) -> str:
        end = self._end
        state = end.reason if isinstance(end, ModelReply) else "failed" if end else "running"
        return f"<ReplyStream {state}: {self.text!r}>"

    @property
    def failed(self) -> bool:
        return isinstance(self._end, RequestError)

    def __next__(self) -> str:
        return next(self.pieces()).text

    def pieces(self) -> Iterator[TextPiece]:
        """Yields the rest of the reply, with log probabilities if they were asked for."""
        if self._shows_reading:
            self._shows_reading = False
            show_reading(self._job, self._has_item)
        while self._end is None:
            item = self._items.get()
            if isinstance(item, TextPiece):
                self.text += item.text
                yield item
            else:
                self._end = item
        if isinstance(self._end, RequestError):
            raise self._end

    def _has_item(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._items.empty() and time.monotonic() < deadline:
            time.sleep(0.005)
        return not self._items.empty()

    def reply(self) -> ModelReply:
        """Waits for the end; returns the whole reply. Each call raises an error of the engine."""
        for _ in self.pieces():
            pass
        assert isinstance(self._end, ModelReply)
        return self._end

    def cancel(self) -> None:
        """Ends the reply soon; its text so far is kept."""
        self._job.cancel()
