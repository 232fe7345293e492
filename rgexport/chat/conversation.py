"""A conversation, whose state always equals that of one prefill of its rendered template."""

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

    The tokens of a reply may differ from those that its text encodes to: the template may trim it,
    and a model can spell a word in pieces that the tokenizer would not choose. So after each reply
    the whole conversation is rendered. Where the state differs from that, it returns to a snapshot
    (states have a fixed size) and prefills the rendered reply from there.
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
        """Starts an empty conversation."""
        self.session.reset()
        self.messages: list[Message] = []
        self.stats = GenerationStats()
        self.ids: list[int] = []
        """The tokens that the session's state has seen."""
        # The start, the end of the last turn and, during a reply, the end of its prompt.
        self._snapshots = [_Snapshot([], self.session.get_state())]

    @property
    def position(self) -> int:
        """Tokens in the state."""
        return len(self.ids)

    def send(self, text: str) -> Generator[str, None, None]:
        """Yields the reply to `text`, one piece (perhaps "") per token.

        Closing the iterator ends the reply there; the part that was yielded stays in the
        conversation. An error or a KeyboardInterrupt undoes the turn.

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
            # The reader may close this generator at any piece; the turn is completed anyway.
            with contextlib.suppress(GeneratorExit):
                yield from self._reply(logits, reply)
            self.ids = (prompt + reply)[: int(self.session.position[0])]
            self._complete(messages, self.tokenizer.decode(reply))
        except BaseException:
            # The engine may have been stopped within a step: its state may be inconsistent.
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
        """Advances the state to the end of the model's turn."""
        messages = [*messages, {"role": "assistant", "content": reply}]
        ids = self.template.render_ids(self.tokenizer, messages, add_generation_prompt=False)
        self._advance(ids, GenerationStats())
        self._snapshots = [self._snapshots[0], _Snapshot(ids, self.session.get_state())]
        self.messages = messages

    def _advance(self, ids: list[int], stats: GenerationStats) -> np.ndarray:
        """Advances the state to `ids`, feeding at least one; logits [vocab] of the last."""
        shared = _common_prefix(self.ids, ids[:-1])
        if shared < len(self.ids):
            self._restore([s for s in self._snapshots if len(s.ids) <= shared])
        logits = prefill(self.session, ids[len(self.ids) :], stats)
        self.ids = ids
        return logits

    def _restore(self, snapshots: list[_Snapshot]) -> None:
        """Drops other snapshots and returns to the last of these."""
        self._snapshots = snapshots
        self.session.set_state(snapshots[-1].state)
        self.ids = snapshots[-1].ids


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
