"""Requests to a scheduler, their progress, and the events that their listeners get."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from rgexport.chat.masks import Mask, ReplyMask
from rgexport.chat.prompt_lookup import PromptLookup
from rgexport.chat.sampling import Sampler, Sampling
from rgexport.chat.state_folder import Fetch
from rgexport.errors import RequestError
from rgexport.griffin.state import State

KEPT_EVERY = 512
"""Interval, in tokens of a long prompt, at which its state is stored."""


class Busy(RequestError):
    """An error of a request that comes while too many others wait."""


class EngineError(RequestError):
    """An error of the engine or of a listener, which is not the request's fault."""


Reason = Literal["stop", "length", "cancelled", "error"]
Ending = tuple[Reason, RequestError | None]


@dataclass(frozen=True)
class End:
    """The end of a reply.

    Attributes:
        reason: `stop` after a stop id, or a listener that returned False.
        cached_tokens: tokens of the prompt that had a known state.
        read_seconds: time from admission to the first token.
        write_seconds: time from the first token to the end.
        state: after a prompt that was only read.
    """

    reason: Reason
    cached_tokens: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    error: RequestError | None = None
    state: State | None = None


class Listener(Protocol):
    """A receiver of one reply. The scheduler's thread calls it, so it must not block."""

    def token(self, token: int, logits: np.ndarray) -> bool:
        """Takes a token and the logits [vocab] before penalties; False ends the reply."""
        ...

    def end(self, end: End) -> None:
        """Takes the end of the reply; no call follows."""
        ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of a reply.

    Attributes:
        max_new_tokens: the most tokens of the reply.
        draft: tokens of a text that the reply may repeat.
        mask: the tokens that a grammar allows; it serves this reply alone.
        client: name of the client; clients take turns, and share the rows.
        namespace: states are found only in their namespace.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    draft: Sequence[int] = ()
    mask: Mask | None = None
    client: str = ""
    namespace: str = ""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(GenerationOptions):
    """A prompt to read, and a reply to write; without new tokens, only the state is stored.

    Attributes:
        keep: lengths of prefixes of the prompt whose states are stored, beside the whole prompt's.
        prompt_logits: takes tokens of the prompt and the logits [T, vocab] that predict them, in
            the scheduler's thread. The whole prompt is read then.
        first: whether it goes before other requests of its client.
        lasting: whether the states after the prompt and the reply are also stored in the folder.
    """

    ids: Sequence[int]
    listener: Listener
    stop_ids: Collection[int] = ()
    keep: Collection[int] = ()
    prompt_logits: Callable[[Sequence[int], np.ndarray], None] | None = None
    first: bool = False
    lasting: bool = True


def require_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError if an id is outside of the vocabulary."""
    if not len(ids) or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    wrong = next(token for token in ids if not 0 <= token < vocab_size)
    raise RequestError(
        f"there is no token id {wrong}: the model has {vocab_size} tokens; "
        f"expected ids from 0 to {vocab_size - 1}, from the model's own tokenizer"
    )


class GenerationJob:
    """A request that waits or runs.

    Only the scheduler's thread changes it, but any thread may cancel it and read its progress.

    Attributes:
        ids: prompt and reply so far.
        cancelled: whether it ends after the current step or chunk.
        foreign: whether its state follows from one that another artifact has computed.
        fed: number of `ids` that the row's state has seen.
        written: number of tokens of the reply so far.
        cached: number of tokens of the prompt that had a known state.
        stored: number of `ids` after which the state was last stored.
        began: `perf_counter` at admission; 0 before.
        replied: `perf_counter` when the prompt was read; 0 before.
        fetch: a read of a saved state of a prefix of the prompt.
        paused: the state of its row, while another client has that row.
        state: after the prompt, if that was only to be read.
        mask: computes `request.mask` in other threads.
        held: logits whose mask is not ready; the row takes no step until it is.
        lookup: drafts its next tokens.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.ids = list(request.ids)
        self.cancelled = False
        self.foreign = False
        self.fed = 0
        self.written = 0
        self.cached = 0
        self.stored = 0
        self.began = 0.0
        self.replied = 0.0
        self.fetch: Fetch | None = None
        self.paused: State | None = None
        self.state: State | None = None
        self.mask: ReplyMask | None = None
        self.held: np.ndarray | None = None
        self.lookup = PromptLookup(self.ids, request.draft)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler, created late: it is slow, and cancelled requests never need it."""
        return Sampler(self.request.sampling, self.request.ids)

    def cancel(self) -> None:
        """Ends it after the current step or chunk; safe in a finalizer, whatever locks are held."""
        self.cancelled = True

    def stops(self) -> list[int]:
        """Returns the lengths, above `fed`, at which the prompt's state is stored, in order."""
        end = len(self.request.ids)
        lengths = {*self.request.keep, end}
        if end - self.cached > KEPT_EVERY:
            lengths.update(range(KEPT_EVERY, end, KEPT_EVERY))
        return sorted(length for length in lengths if self.fed < length <= end)
