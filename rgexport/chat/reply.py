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
from rgexport.chat.stop_strings import StopStrings
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
    sampling_names = {field.name for field in fields(Sampling)}
    values = {name: options.pop(name) for name in reply_names & options.keys()}
    if isinstance(values.get("draft"), str):
        raise RequestError("draft is a text; expected its tokens, as Model.draft_of gives them")
    unknown = sorted(options.keys() - sampling_names)
    if unknown:
        expected = sorted(sampling_names | reply_names)
        raise RequestError(
            f"there is no option {', '.join(unknown)}; expected some of {', '.join(expected)}"
        )
    try:
        return ReplyOptions(sampling=Sampling(**options), **values)
    except TypeError as error:
        raise RequestError(f"an option has a value of the wrong type: {error}") from None


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log probability (None for a prompt's first), and the most likely ones.

    `top` has the ids and the log probabilities of the most likely tokens.
    """

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

    Attributes:
        cached_tokens: tokens of the prompt that had a known state.
        read_seconds: time from admission to the first token.
        write_seconds: time from the first token to the end.
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
        """The number of tokens of the reply."""
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


class ReplyWriter:
    """The listener of a scheduler that delivers a reply as text.

    Only the scheduler's thread calls it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], options: ReplyOptions, deliver: Deliver
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = StopStrings(options.stop)
        self._prompt_tokens = len(prompt)
        self._logprobs = options.logprobs
        self._deliver = deliver
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._undelivered: list[ScoredToken] = []
        """Tokens since the last piece, if they are asked for."""
        if options.prompt_logprobs:
            self._undelivered.append(ScoredToken(prompt[0], None, ()))

    def token(self, token: int, logits: np.ndarray) -> bool:
        """Takes a token and its logits [vocab]; returns False after a stop string."""
        self._ids.append(token)
        if self._logprobs is not None:
            self._undelivered.append(_scored(token, logits, self._logprobs))
        text = self._decoder.add(token)
        self._add(self._stop.add(text))
        return self._stop.match is None

    def prompt(self, ids: Sequence[int], logits: np.ndarray) -> None:
        """Takes tokens of the prompt and the logits [T, vocab] that predict them."""
        for token, row in zip(ids, logits, strict=True):
            self._undelivered.append(_scored(token, row, self._logprobs or 0))

    def end(self, end: End) -> None:
        """Delivers the text that was held back, then the reply or its error."""
        text = self._stop.add(self._decoder.finish())
        self._add(text + self._stop.finish(), last=True)
        if end.error is not None:
            self._deliver(end.error)
            return
        reply = ModelReply(
            text="".join(self._texts),
            ids=tuple(self._ids),
            reason=end.reason if self._stop.match is None else "stop",
            prompt_tokens=self._prompt_tokens,
            cached_tokens=end.cached_tokens,
            read_seconds=end.read_seconds,
            write_seconds=end.write_seconds,
        )
        self._deliver(reply)

    def _add(self, text: str, *, last: bool = False) -> None:
        """Delivers a piece unless it is empty; the `last` one may have only tokens."""
        if text or (last and self._undelivered):
            self._texts.append(text)
            self._deliver(TextPiece(text, tuple(self._undelivered)))
            self._undelivered = []


def _scored(token: int, logits: np.ndarray, count: int) -> ScoredToken:
    """Returns a token with its log probability, and those of the `count` most likely tokens."""
    values = log_probabilities(logits)
    best: list[tuple[int, float]] = []
    if count:
        best = [(int(index), float(values[index])) for index in most_likely(logits, count)]
    return ScoredToken(token, float(values[token]), tuple(best))


class ReplyStream(Iterator[str]):
    """The pieces of a reply as they come, and their `text`; garbage collection cancels it.

    One thread at a time may iterate; any thread may cancel.
    """

    def __init__(
        self, start: Callable[[Deliver], GenerationJob], *, shows_reading: bool = False
    ) -> None:
        """Starts the reply; with `shows_reading`, the first wait shows the reading's progress."""
        self.text = ""
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._job = start(self._items.put)
        self._shows_reading = shows_reading
        self._end: ModelReply | RequestError | None = None
        finalizer = weakref.finalize(self, self._job.cancel)
        finalizer.atexit = False

    def __repr__(self) -> str:
        if isinstance(self._end, ModelReply):
            state: str = self._end.reason
        elif self._end is not None:
            state = "failed"
        else:
            state = "running"
        return f"<ReplyStream {state}: {self.text!r}>"

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
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
        """Waits for an item, at most so many seconds; returns whether there is one."""
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
