"""Chat templates, and the prompts that they make of conversations."""

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np

from rgexport.chat.template_sandbox import Sandbox
from rgexport.chat.tokenizer import CUT, Tokenizer
from rgexport.errors import RequestError, reason
from rgexport.griffin.control_tokens import chat_template, missing_turns

Message = Mapping[str, str]
"""`role` ("user" or "assistant") and `content`, as Hugging Face's templates expect them."""
_LONG_TEXT, _LONG_CONVERSATION = 1 << 14, 1 << 18
"""Characters of a message, and of all messages, from which another process makes the prompt."""
_SLICE, _SHARE = 1 << 14, 7 / 8
"""Characters that are counted at once; smallest ratio of the whole text's tokens to the sum of its
slices' tokens."""
_CHARACTERS = 4
_TURN_TOKENS = 16  # more tokens than a template writes around a message
_LAST_TURNS = 4  # number of last messages after which a prompt's state is stored


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template; `origin` names it in errors."""

    source: str
    origin: str

    def render_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation, with one BOS first if the vocabulary has it.

        Special literals of the template become their ids; inside a message they are text. Raises
        RequestError if the template refuses these messages or is broken.
        """
        neutral = [{key: tokenizer.cut(text) for key, text in m.items()} for m in messages]
        rendered = self.render(
            neutral,
            add_generation_prompt,
            tools=None if tools is None else _cut_all(tools, tokenizer),
            bos_token=tokenizer.literal(tokenizer.bos_id),
            eos_token=tokenizer.literal(tokenizer.eos_id),
        )
        ids = tokenizer.encode_markup(rendered)
        if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        **tokens: str,
    ) -> str:
        """Returns the text of a conversation; `tokens` are `bos_token` and the like."""
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        values = tokens | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            template = Sandbox(messages, **functions).template(self.source)
            text: str = template.render(**values, tools=tools, documents=None)
        except Exception as error:  # a template can raise any exception
            cause = reason(error).replace(CUT, "")
            raise RequestError(f"chat template ({self.origin}): {cause}") from None
        return text

    def check_turns(self, tokenizer: Tokenizer) -> None:
        if missing := missing_turns(self.source, tokenizer.special):
            raise RequestError(
                f"the tokenizer has no {' and no '.join(missing)}, which the chat template "
                f"({self.origin}) needs; this model cannot chat: use `rgexport generate`"
            )


def load_template(folder: Path) -> ChatTemplate:
    """Returns the template of chat_template.jinja or tokenizer_config.json, or Gemma's."""
    return ChatTemplate(*chat_template(folder))


def _cut_all(value: Any, tokenizer: Tokenizer) -> Any:
    if isinstance(value, str):
        return tokenizer.cut(value)
    if isinstance(value, Mapping):
        return {tokenizer.cut(str(k)): _cut_all(v, tokenizer) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_cut_all(item, tokenizer) for item in value]
    return value


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@dataclass(frozen=True)
class PromptTokens:
    """Tokens before a reply; states of prefixes of the lengths `keep` are stored."""

    ids: list[int]
    keep: tuple[int, ...] = ()
    messages: tuple[Message, ...] | None = None


class PromptEncoder:
    """Makes the prompts of one model, of at most `most_tokens`.

    For long texts, `elsewhere` calls a function with the encoder of the same model in another
    process, and the arguments after it.
    """

    most_tokens: int | None = None
    elsewhere: Callable[..., Any] | None = None

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, known: Callable[[list[int], str], int]
    ) -> None:
        """Takes a function that returns the length of the known prefix of ids in a namespace."""
        self.tokenizer, self.template, self._known = tokenizer, template, known

    def conversation_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        namespace: str = "",
    ) -> PromptTokens:
        """Returns the tokens of a conversation up to where the model's reply begins.

        `tools` are descriptions of tools, for templates that support them.
        """
        if self.elsewhere and _is_long(messages, tools):
            prompt: PromptTokens = self.elsewhere(
                PromptEncoder.conversation_prompt, messages, tools
            )
            known = self._known(prompt.ids, namespace) if prompt.keep else 0
            return replace(prompt, keep=tuple(length for length in prompt.keep if length > known))
        if self.most_tokens is not None:
            self._require_few_tokens([message["content"] for message in messages])
        if tools:
            return PromptTokens(self.template.render_ids(self.tokenizer, messages, True, tools))
        ids = self._render(messages, reply=True)
        known = self._known(ids, namespace)
        return PromptTokens(ids, tuple(self._branches(messages, ids, known)), tuple(messages))

    def text_ids(self, text: str) -> list[int]:
        """Returns the tokens of a plain prompt: BOS, if the vocabulary has it, and the text."""
        bos = self.tokenizer.bos_id
        ids = [*([] if bos is None else [bos]), *self.encode(text)]
        if not ids:
            raise RequestError("the prompt is empty and the tokenizer has no bos; give a prompt")
        return ids

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text alone, if they are not many more than `most_tokens`."""
        if self.elsewhere and len(text) > _LONG_TEXT:
            ids: list[int] = self.elsewhere(PromptEncoder.encode, text)
            return ids
        self._require_few_tokens([text])
        return self.tokenizer.encode_text(text)

    def opening_ids(self, messages: Sequence[Message]) -> list[int]:
        *before, last = messages
        one, two = (
            self._render([*before, {**last, "content": last["content"] + end}], reply=False)
            for end in ("\n\n1", "\n\nx")
        )
        return one[: common_prefix(one, two)]

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a conversation that ends with a finished turn."""
        if self.elsewhere and _is_long(messages):
            ids: list[int] = self.elsewhere(PromptEncoder.conversation_ids, messages)
            return ids
        return self._render(messages, reply=False)

    def _require_few_tokens(self, texts: Sequence[str]) -> None:
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
        """Returns the tokens; a template without system prompts puts one into the first message."""
        _require_messages(messages)
        try:
            return self.template.render_ids(self.tokenizer, messages, reply)
        except RequestError:
            merged = _without_system(messages)
            if merged is None:
                raise
            return self.template.render_ids(self.tokenizer, merged, reply)

    def _branches(self, messages: Sequence[Message], ids: list[int], known: int) -> Iterator[int]:
        """Yields the lengths, above `known`, at which other conversations may branch off."""
        last = len(self.tokenizer.encode_text(messages[-1]["content"]))
        if known and len(ids) - known < last + _TURN_TOKENS:
            return  # only the last message is new
        for count in range(len(messages) - 1, max(0, len(messages) - 1 - _LAST_TURNS), -1):
            length = self._shared(messages[:count], ids)
            if length <= known:
                break
            yield length
        if messages[0]["role"] == "system" and len(messages) > 1:
            first = "y" if messages[1]["content"].startswith("x") else "x"
            length = self._shared([messages[0], {"role": "user", "content": first}], ids)
            if length > known:
                yield length

    def _shared(self, messages: Sequence[Message], ids: list[int]) -> int:
        with contextlib.suppress(RequestError):
            return common_prefix(ids, self._render(messages, reply=False))
        return 0


def _is_long(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> bool:
    sizes = [len(message["content"]) for message in messages]
    if tools:
        sizes.append(len(json.dumps(tools)))
    return max(sizes, default=0) > _LONG_TEXT or sum(sizes) > _LONG_CONVERSATION


def _require_messages(messages: Sequence[Message]) -> None:
    if not messages or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise RequestError('messages are not a list such as [{"role": "user", "content": "Hello"}]')


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
        return None
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": "user", "content": text}, *messages[2:]]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    differing = np.flatnonzero(np.array(first[:length]) != np.array(second[:length]))
    return int(differing[0]) if len(differing) else length
