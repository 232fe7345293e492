"""Requests to a scheduler, their progress, and the events that their listeners get."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from rgexport.chat.sampling import Sampler, Sampling
from rgexport.chat.speculation import PromptLookup
from rgexport.chat.state_folder import Fetch
from rgexport.errors import RequestError
from rgexport.griffin.state import State

if TYPE_CHECKING:
    from rgexport.chat.masks import ReplyMask

KEPT_EVERY = 512
"""Interval, in tokens of a long prompt, at which its state is stored."""


class Busy(RequestError):
    pass


class EngineError(RequestError):
    pass


class Mask(Protocol):
    """The tokens, bool [vocab], that a grammar allows next, for one reply.

    Other threads call it. Its error, or slowness (`masks.MASK_SECONDS`), ends only its reply.
    """

    def allowed(self) -> np.ndarray: ...

    def accept(self, token: int) -> None: ...


Reason = Literal["stop", "length", "cancelled", "error"]
Ending = tuple[Reason, RequestError | None]


@dataclass(frozen=True)
class End:
    """The end of a reply; `stop` is a stop id or a listener that returned False.

    `cached_tokens` of the prompt had a known state. `read_seconds` last from admission to the first
    token, `write_seconds` from there to the end. `state` is after a prompt that was only read.
    """

    reason: Reason
    cached_tokens: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    error: RequestError | None = None
    state: State | None = None


class Listener(Protocol):
    """Receives a reply in the scheduler's thread, so it must not block.

    A token comes with the logits [vocab] that it was chosen by, before penalties.
    """

    def token(self, token: int, logits: np.ndarray) -> bool: ...

    def end(self, end: End) -> None: ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of a reply, which may repeat tokens (`draft`), and has a `mask` for itself.

    `max_new_tokens` is the most tokens of a reply. Clients take turns, and share the rows. States
    are found only in their namespace.
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
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"there is no token id {wrong}: the model has {vocab_size} tokens; "
            f"expected ids from 0 to {vocab_size - 1}, from the model's own tokenizer"
        )


class GenerationJob:
    """A request that waits or runs.

    Attributes:
        ids: prompt and reply so far.
        fed: number of `ids` that the row's state has seen.
        stored: number of `ids` after which the state was last stored.
        foreign: whether its state follows from one that another artifact has computed.
        paused: the state of its row, while another client has that row.
        held: logits whose mask is not ready; the row takes no step until it is.
        state: after the prompt, if that was only to be read.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request, self.ids = request, list(request.ids)
        self.cancelled = self.foreign = False
        self.fed = self.written = self.cached = self.stored = 0
        self.began = self.replied = 0.0
        self.fetch: Fetch | None = None
        self.paused: State | None = None
        self.state: State | None = None
        self.mask: ReplyMask | None = None
        self.held: np.ndarray | None = None
        self.lookup = PromptLookup(self.ids, request.draft)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """Created late: it is slow, and cancelled requests never need it."""
        return Sampler(self.request.sampling, self.request.ids)

    def cancel(self) -> None:
        """Ends it after the current step or chunk; safe in a finalizer, whatever locks are held."""
        self.cancelled = True

    def stops(self) -> list[int]:
        end = len(self.request.ids)
        is_long = end - self.cached > KEPT_EVERY
        every = range(KEPT_EVERY, end, KEPT_EVERY) if is_long else ()
        return sorted(n for n in {*self.request.keep, *every, end} if self.fed < n <= end)
