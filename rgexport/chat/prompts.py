"""Prompts: the tokens of texts and conversations, and where their states are worth keeping."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rgexport.chat.template import ChatTemplate, Message
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError

_LONG_TEXT, _LONG_CONVERSATION = 1 << 14, 1 << 18
"""Characters of a message, and of all, from which a conversation is prepared elsewhere."""
_SLICE, _SHARE = 1 << 14, 7 / 8
"""Characters that are counted at once; the least share of their tokens that the whole text has."""
_CHARACTERS = 4
"""Characters of a token, about."""
_TURN_TOKENS = 16
"""More than a template writes around a message."""
_LAST_TURNS = 4
"""Messages, counted from the last, after which a prompt's state is kept."""


@dataclass(frozen=True)
class Prompt:
    """What is read before a reply.

    Attributes:
        ids: its tokens.
        keep: numbers of its first tokens whose states are worth keeping.
        messages: the conversation, if it is one.
    """

    ids: list[int]
    keep: tuple[int, ...] = ()
    messages: tuple[Message, ...] | None = None


class Prompts:
    """Makes the prompts of one model.

    Attributes:
        most_tokens: tokens of the longest prompt that is accepted; None for any.
        elsewhere: calls a function with the prompts of the same model in another process, and the
            arguments after it; long texts are encoded there. None if there is no such process.
    """

    most_tokens: int | None = None
    elsewhere: Callable[..., Any] | None = None

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, known: Callable[[list[int], str], int]
    ) -> None:
        """Takes the vocabulary, the template, and what counts the tokens known in a namespace."""
        self.tokenizer, self.template, self._known = tokenizer, template, known

    def conversation_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        namespace: str = "",
    ) -> Prompt:
        """The tokens of a conversation up to where the model's reply begins.

        Args:
            messages: its turns.
            tools: what the template tells the model of, if it has a place for them.
            namespace: states of this one are known, see `ReplyOptions`.

        Raises:
            RequestError: the template refuses the messages.
        """
        if self.elsewhere and _is_long(messages, tools):
            prompt: Prompt = self.elsewhere(Prompts.conversation_prompt, messages, tools)
            known = self._known(prompt.ids, namespace) if prompt.keep else 0
            return replace(prompt, keep=tuple(length for length in prompt.keep if length > known))
        if self.most_tokens is not None:
            self._require_few_tokens([message["content"] for message in messages])
        if tools:
            render = self.template.render_ids
            return Prompt(render(self.tokenizer, messages, True, tools))
        ids = self._render(messages, reply=True)
        known = self._known(ids, namespace)
        return Prompt(ids, tuple(self._places(messages, ids, known)), tuple(messages))

    def text_ids(self, text: str) -> list[int]:
        """The tokens of a plain prompt: bos, if the vocabulary has it, and the text.

        Raises:
            RequestError: there are none.
        """
        bos = self.tokenizer.bos_id
        ids = [*([] if bos is None else [bos]), *self.encode(text)]
        if not ids:
            raise RequestError("the prompt is empty and the tokenizer has no bos; give a prompt")
        return ids

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone.

        Raises:
            RequestError: there are more than `most_tokens`, by far.
        """
        if self.elsewhere and len(text) > _LONG_TEXT:
            ids: list[int] = self.elsewhere(Prompts.encode, text)
            return ids
        self._require_few_tokens([text])
        return self.tokenizer.encode_text(text)

    def opening_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation up to where the text of its last message can go on.

        Raises:
            RequestError: the template refuses the messages.
        """
        *before, last = messages
        one, other = (
            self._render([*before, {**last, "content": last["content"] + more}], reply=False)
            for more in ("\n\n1", "\n\nx")
        )
        return one[: common_prefix(one, other)]

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation whose last turn is over.

        Raises:
            RequestError: the template refuses the messages.
        """
        if self.elsewhere and _is_long(messages):
            ids: list[int] = self.elsewhere(Prompts.conversation_ids, messages)
            return ids
        return self._render(messages, reply=False)

    def _require_few_tokens(self, texts: Sequence[str]) -> None:
        """Refuses texts that are far too long without encoding them to their end.

        Raises:
            RequestError: they have more than `most_tokens`.
        """
        most, count = self.most_tokens, 0
        if most is None or sum(map(len, texts)) <= _CHARACTERS * most:
            return
        for text in texts:
            for start in range(0, len(text), _SLICE):
                count += len(self.tokenizer.encode_text(text[start : start + _SLICE]))
                if _SHARE * count > most:
                    raise RequestError(
                        f"the text has more than {most} tokens; this server takes up to {most}"
                    )

    def _render(self, messages: Sequence[Message], *, reply: bool) -> list[int]:
        """The tokens of a conversation.

        Where the template has no system prompt, the first message begins with it.
        """
        _require_messages(messages)
        render = self.template.render_ids
        try:
            return render(self.tokenizer, messages, add_generation_prompt=reply)
        except RequestError:
            merged = _without_system(messages)
            if merged is None:
                raise
            return render(self.tokenizer, merged, add_generation_prompt=reply)

    def _places(self, messages: Sequence[Message], ids: list[int], known: int) -> Iterator[int]:
        """Where other conversations may branch off, beyond the tokens that are `known`.

        These are the ends of the last turns, and that of a system prompt.
        """
        last = len(self.tokenizer.encode_text(messages[-1]["content"]))
        if known and len(ids) - known < last + _TURN_TOKENS:
            return  # the last message alone is new
        for count in range(len(messages) - 1, max(0, len(messages) - 1 - _LAST_TURNS), -1):
            place = self._shared(messages[:count], ids)
            if place <= known:
                break
            yield place
        if messages[0]["role"] == "system" and len(messages) > 1:
            text = messages[1]["content"]
            other = {"role": "user", "content": "y" if text.startswith("x") else "x"}
            place = self._shared([messages[0], other], ids)
            if place > known:
                yield place

    def _shared(self, messages: Sequence[Message], ids: list[int]) -> int:
        """How many tokens a conversation begins with like `ids`; 0 if it cannot be rendered."""
        with contextlib.suppress(RequestError):
            return common_prefix(ids, self._render(messages, reply=False))
        return 0


def _is_long(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> bool:
    sizes = [len(message["content"]) for message in messages]
    if tools:
        sizes.append(len(json.dumps(tools)))
    return max(sizes, default=0) > _LONG_TEXT or sum(sizes) > _LONG_CONVERSATION


def _require_messages(messages: Sequence[Message]) -> None:
    """Refuses what is no list of messages, or an empty one."""
    fields = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, Mapping)]
    sound = len(fields) == len(messages) and all(
        isinstance(text, str) for pair in fields for text in pair
    )
    if not fields or not sound:
        raise RequestError(
            'the messages are not a list such as [{"role": "user", "content": "Hello"}]'
        )


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the system prompt in the first user's; None if that cannot be."""
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
        return None
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": text}, *messages[2:]]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(np.array(left[:length]) != np.array(right[:length]))
    return int(differing[0]) if len(differing) else length
