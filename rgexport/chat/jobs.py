"""What a scheduler is asked, and what it answers."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from rgexport.chat.lookup import Lookup
from rgexport.chat.sampling import Sampler, Sampling
from rgexport.chat.state_folder import Fetch
from rgexport.errors import RequestError
from rgexport.griffin.state import State

if TYPE_CHECKING:
    from rgexport.chat.masks import ReplyMask

KEPT_EVERY = 512
"""Tokens of a long prompt after which its state is kept."""


class Busy(RequestError):
    """There are too many requests already."""


class EngineError(RequestError):
    """The engine failed; whatever it was computing is lost."""


class Mask(Protocol):
    """The tokens that a grammar allows next, for one reply.

    Other threads call it, one at a time, while the model takes its step. An error of a mask ends
    its reply alone, and so does a mask that takes longer than `masks.MASK_SECONDS` for a token.
    """

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, bool [vocab]."""
        ...

    def accept(self, token: int) -> None:
        """Takes the token that was chosen; not called for the last one of a reply."""
        ...


Reason = Literal["stop", "length", "cancelled", "error"]
Ending = tuple[Reason, RequestError | None]
"""Why a reply ends, and the error if it is one."""


@dataclass(frozen=True)
class Token:
    """A token of a reply; `logits` [vocab] are those that it was chosen by, before penalties."""

    id: int
    logits: np.ndarray


@dataclass(frozen=True)
class End:
    """The end of a reply: why, and what it cost.

    Attributes:
        reason: `stop` for a stop id or a listener that has enough.
        cached_tokens: of the prompt, that did not have to be read.
        read_seconds: from the request's turn until its first token.
        write_seconds: from there to the end.
        error: of the reason `error`.
        state: of a prompt that was only read.
    """

    reason: Reason
    cached_tokens: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    error: RequestError | None = None
    state: State | None = None


class Listener(Protocol):
    """Hears of a reply in the scheduler's thread, so it must not wait.

    The end of a reply that never had a row may come from the thread of another request.
    """

    def token(self, token: Token) -> bool:
        """Takes the next token; whether the reply goes on."""
        ...

    def end(self, end: End) -> None:
        """Called once, at the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to read, and what to write after it.

    Attributes:
        ids: the prompt, at least one token.
        listener: hears of the reply.
        sampling: how tokens are chosen.
        draft: tokens that the reply may repeat.
        max_new_tokens: most tokens of the reply; 0 only reads, and keeps the state.
        stop_ids: tokens that end the reply; they are not part of it.
        keep: lengths of prefixes of the prompt whose states are kept, beside its own.
        mask: the tokens that may be written; no other request has it.
        prompt_logits: takes tokens of the prompt and the logits [T, vocab] that predict them, part
            by part, in the scheduler's thread. The whole prompt is read then, even where a state
            after a part of it is known.
        client: who asks; clients take turns, and share the rows.
        namespace: states are found only by requests of the same one.
        first: whether it goes before the others of its client.
        lasting: whether the states of the prompt's and the reply's end go into a folder, too.
    """

    ids: Sequence[int]
    listener: Listener
    sampling: Sampling = field(default_factory=Sampling)
    draft: Sequence[int] = ()
    max_new_tokens: int = 256
    stop_ids: Collection[int] = ()
    keep: Collection[int] = ()
    mask: Mask | None = None
    prompt_logits: Callable[[Sequence[int], np.ndarray], None] | None = None
    client: str = ""
    namespace: str = ""
    first: bool = False
    lasting: bool = True


def require_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuses ids that the model does not have.

    Raises:
        RequestError: there is one; the message names the first.
    """
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"there is no token id {wrong}: the model has {vocab_size} tokens; "
            f"expected ids from 0 to {vocab_size - 1}, from the model's own tokenizer"
        )


class Job:
    """A request under way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        self.fed = 0
        """Tokens of `ids` that the row's state has seen."""
        self.ids = list(request.ids)
        self.written = 0
        self.fetch: Fetch | None = None
        """What the folder of states reads for it."""
        self.foreign = False
        """Whether its state follows from one that another artifact has computed."""
        self.cached = 0
        self.stored = 0
        """Tokens of `ids` after which the state was last stored."""
        self.paused: State | None = None
        """The state of its row, while another client has that row."""
        self.began = self.replied = 0.0
        self.lookup = Lookup(self.ids, request.draft)
        self.mask: ReplyMask | None = None
        self.held: np.ndarray | None = None
        """Logits whose mask is not ready: the row takes no step until it is."""

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler, which takes as long to make as all else; replies that are left need none."""
        return Sampler(self.request.sampling, self.request.ids)

    def cancel(self) -> None:
        """Ends it after the current step or chunk; it stops counting as waiting at once.

        Only sets a flag, so that a finalizer may call it in any thread, whatever lock that holds.
        """
        self.cancelled = True

    def stops(self) -> list[int]:
        """Where reading pauses to keep a state, from here on."""
        end = len(self.request.ids)
        is_long = end - self.cached > KEPT_EVERY
        every = range(KEPT_EVERY, end, KEPT_EVERY) if is_long else ()
        places = {*self.request.keep, *every, end}
        return sorted(place for place in places if self.fed < place <= end)
