"""A reply as text: what a scheduler's tokens say, and what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from rgexport.chat.jobs import End, Mask, Reason, Token
from rgexport.chat.sampling import Sampling, log_probabilities, most_likely
from rgexport.chat.stopping import StopStrings
from rgexport.chat.tokenizer import StreamDecoder, Tokenizer
from rgexport.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """How to reply.

    Attributes:
        sampling: how tokens are chosen.
        max_new_tokens: most tokens of the reply.
        stop: texts that end the reply and are not part of it.
        logprobs: of how many of the most likely tokens to report log probabilities, beside the
            chosen one's; None for none at all.
        prompt_logprobs: whether the first piece also has the prompt's tokens, with their log
            probabilities. The whole prompt is read then, whatever was read before.
        mask: the tokens that may be written, see `jobs.Mask`; each reply needs its own.
        draft: tokens that the reply may repeat, see `Model.draft_of`.
        client: who asks; clients take turns, and share the rows.
        namespace: states are found only by replies of the same one.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 1024
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    mask: Mask | None = None
    draft: Sequence[int] = ()
    client: str = ""
    namespace: str = ""

    def __post_init__(self) -> None:
        """Refuses what is outside its range.

        Raises:
            RequestError: it is.
        """
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if isinstance(self.stop, str):
            raise RequestError(f"stop is {self.stop!r}; expected a list of texts")


def reply_options(**options: Any) -> ReplyOptions:
    """Options of a reply and of its sampling, by name.

    Raises:
        RequestError: a name is unknown, or a value is outside its range.
    """
    own = {field.name for field in fields(ReplyOptions)} - {"sampling"}
    chosen = {name: options.pop(name) for name in own & options.keys()}
    if isinstance(chosen.get("draft"), str):
        raise RequestError("draft is a text; expected its tokens, as Model.draft_of gives them")
    known = {field.name for field in fields(Sampling)}
    if unknown := sorted(options.keys() - known):
        raise RequestError(
            f"there is no option {', '.join(unknown)}; expected some of "
            f"{', '.join(sorted(known | own))}"
        )
    try:
        return ReplyOptions(sampling=Sampling(**options), **chosen)
    except TypeError as error:
        raise RequestError(f"an option has a value of the wrong type: {error}") from None


@dataclass(frozen=True)
class Chosen:
    """A token, its log probability before penalties and temperature, and the most likely ones.

    The log probability of a prompt's first token is None.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text of a reply, perhaps "", and the tokens since the last piece if they were asked for."""

    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole reply.

    Attributes:
        text: what was said.
        ids: its tokens.
        reason: why it ended.
        prompt_tokens: tokens before the reply.
        cached_tokens: of these, that did not have to be read.
        read_seconds: until the first token, from when the request had its turn.
        write_seconds: from there to the end.
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
        """Tokens of the reply."""
        return len(self.ids)

    @property
    def read_rate(self) -> float:
        """Prompt tokens per second, of those that were read; 0 if there were none."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.read_seconds if self.read_seconds else 0.0

    @property
    def write_rate(self) -> float:
        """Tokens per second after the first one; 0 if there were none."""
        return (self.new_tokens - 1) / self.write_seconds if self.new_tokens > 1 else 0.0


Deliver = Callable[[Piece | Reply | RequestError], None]
"""Takes the pieces of a reply, and at last the reply or an error; in another thread."""


class Writer:
    """Makes the text of a reply from its tokens, as a scheduler's listener."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: ReplyOptions,
        deliver: Deliver,
        end: Callable[[Reply | RequestError], None],
    ) -> None:
        """Begins a reply; `deliver` gets its pieces, `end` what it ends with."""
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(options.stop)
        self._prompt_tokens, self._logprobs = len(prompt), options.logprobs
        self._deliver, self._end = deliver, end
        self._said: list[str] = []
        self._waiting = [Chosen(prompt[0], None, ())] if options.prompt_logprobs else []
        self._ids: list[int] = []

    def token(self, token: Token) -> bool:
        """Takes the next token; whether the reply goes on."""
        self._ids.append(token.id)
        if self._logprobs is not None:
            self._waiting.append(chosen(token, self._logprobs))
        self._say(self._stop.add(self._decoder.add(token.id)))
        return self._stop.found is None

    def prompt(self, ids: Sequence[int], logits: np.ndarray) -> None:
        """Takes the next tokens of the prompt, and the logits [T, vocab] that predict them."""
        for token, row in zip(ids, logits, strict=True):
            self._waiting.append(chosen(Token(token, row), self._logprobs or 0))

    def end(self, end: End) -> None:
        """Takes the end."""
        self._say(self._stop.add(self._decoder.finish()) + self._stop.finish(), last=True)
        if end.error is not None:
            self._end(end.error)
            return
        self._end(
            Reply(
                text="".join(self._said),
                ids=tuple(self._ids),
                reason=end.reason if self._stop.found is None else "stop",
                prompt_tokens=self._prompt_tokens,
                cached_tokens=end.cached_tokens,
                read_seconds=end.read_seconds,
                write_seconds=end.write_seconds,
            )
        )

    def _say(self, text: str, *, last: bool = False) -> None:
        if text or (last and self._waiting):
            self._said.append(text)
            self._deliver(Piece(text, tuple(self._waiting)))
            self._waiting = []


def chosen(token: Token, count: int) -> Chosen:
    """A token with its log probability, and those of the `count` most likely ones."""
    values = log_probabilities(token.logits)
    top = most_likely(np.asarray(token.logits), count) if count else ()
    return Chosen(token.id, float(values[token.id]), tuple((int(i), float(values[i])) for i in top))
