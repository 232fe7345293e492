"""A conversation whose state is always what one prefill of its template would leave."""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.chat.generation import GenerationStats, decode, prefill
from rgexport.chat.sampling import Sampler
from rgexport.chat.template import ChatTemplate, Message
from rgexport.chat.tokenizer import StreamDecoder, Tokenizer
from rgexport.griffin.state import State
from rgexport.runtimes.session import Session


@dataclass(frozen=True)
class _Snapshot:
    """A state and the ids that led to it."""

    ids: list[int]
    state: State


class Conversation:
    """Turns of a user and a model over one session, which it resets and then owns.

    The tokens of a reply need not be the ones that its text encodes to: the template may trim
    it, and a model can spell a word in pieces that the tokenizer would not choose. So after each
    reply the conversation is rendered as a whole, and where the state has gone another way it
    returns to a snapshot (states have a fixed size) and reads the rendered reply from there.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampler: Sampler,
        max_new_tokens: int = 1024,
    ) -> None:
        """Starts an empty conversation.

        Raises:
            RequestError: the tokenizer lacks the turn tokens that the template writes.
        """
        template.check_turns(tokenizer)
        self.session = session
        self.tokenizer = tokenizer
        self.template = template
        self.sampler = sampler
        self.max_new_tokens = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was said."""
        self.session.reset()
        self.messages: list[Message] = []
        self.stats = GenerationStats()
        self.ids: list[int] = []
        """The ids that the session's state holds."""
        # The start, the end of the last turn and, while a reply is made, the end of its prompt.
        self._snapshots = [_Snapshot([], self.session.get_state())]

    @property
    def position(self) -> int:
        """Tokens in the state."""
        return len(self.ids)

    def send(self, text: str) -> Generator[str, None, None]:
        """Yields the reply to `text`, one piece (perhaps "") per token.

        Closing the iterator ends the reply there; what was said of it is part of the
        conversation. When an error or a KeyboardInterrupt comes out of it, the turn has not
        taken place.

        Raises:
            RequestError: the template refuses the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.template.render_ids(self.tokenizer, messages, add_generation_prompt=True)
        settled, reply = self._snapshots, list[int]()
        try:
            self.stats = GenerationStats()
            logits = self._advance(prompt, self.stats)
            self._snapshots = [*self._snapshots, _Snapshot(prompt, self.session.get_state())]
            # The reader may close us at any piece; a turn that has begun is always completed.
            with contextlib.suppress(GeneratorExit):
                yield from self._reply(logits, reply)
            self.ids = (prompt + reply)[: int(self.session.position[0])]
            self._complete(messages, self.tokenizer.decode(reply))
        except BaseException:
            # The engine may have been stopped between two tokens: its state is not to be trusted.
            self._restore(settled)
            raise

    def _reply(self, logits: np.ndarray, reply: list[int]) -> Iterator[str]:
        """Yields the text of a reply and appends its ids to `reply`."""
        text = StreamDecoder(self.tokenizer)
        stop_ids = self.tokenizer.stop_ids
        for token in decode(
            self.session, logits, self.sampler, self.max_new_tokens, stop_ids, self.stats
        ):
            reply.append(token)
            yield text.add(token)
        if rest := text.finish():
            yield rest

    def _complete(self, messages: list[Message], reply: str) -> None:
        """Brings the state to the end of the model's turn, whatever ended the reply."""
        messages = [*messages, {"role": "assistant", "content": reply}]
        ids = self.template.render_ids(self.tokenizer, messages, add_generation_prompt=False)
        self._advance(ids, GenerationStats())
        self._snapshots = [self._snapshots[0], _Snapshot(ids, self.session.get_state())]
        self.messages = messages

    def _advance(self, ids: list[int], stats: GenerationStats) -> np.ndarray:
        """Brings the state to `ids`, feeding at least one of them; logits [vocab] of the last."""
        shared = _shared_length(self.ids, ids[:-1])
        if shared < len(self.ids):
            self._restore([s for s in self._snapshots if len(s.ids) <= shared])
        logits = prefill(self.session, ids[len(self.ids) :], stats)
        self.ids = ids
        return logits

    def _restore(self, snapshots: list[_Snapshot]) -> None:
        """Keeps these snapshots and returns to the last of them."""
        self._snapshots = snapshots
        self.session.set_state(snapshots[-1].state)
        self.ids = snapshots[-1].ids


def _shared_length(left: list[int], right: list[int]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
