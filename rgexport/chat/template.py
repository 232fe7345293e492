"""Chat templates: render messages as the tokens that a model was tuned on."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2

from rgexport.chat.template_sandbox import Sandbox
from rgexport.chat.tokenizer import CUT, Tokenizer
from rgexport.errors import RequestError
from rgexport.griffin.chat_template import chat_template, missing_turns

Message = Mapping[str, str]
"""`role` ("user" or "assistant") and `content`, as Hugging Face's templates expect them."""


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

        Special literals of the template become their ids; inside a message they are text. The rest
        is encoded as one string, across the borders of messages.

        Raises:
            RequestError: the template refuses these messages or is broken.
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
            reason = " ".join(str(error).replace(CUT, "").split()) or type(error).__name__
            raise RequestError(f"chat template ({self.origin}): {reason}") from None
        return text

    def check_turns(self, tokenizer: Tokenizer) -> None:
        """Raises RequestError if the vocabulary lacks turn tokens that this template writes."""
        if missing := missing_turns(self.source, tokenizer.special):
            raise RequestError(
                f"the tokenizer has no {' and no '.join(missing)}, which the chat template "
                f"({self.origin}) needs; this model cannot chat: use `rgexport generate`"
            )


def load_template(folder: Path) -> ChatTemplate:
    """Returns the template of chat_template.jinja or tokenizer_config.json, or Gemma's.

    Raises:
        RequestError: a file that cannot be read, or several named templates and no default.
    """
    return ChatTemplate(*chat_template(folder))


def _cut_all(value: Any, tokenizer: Tokenizer) -> Any:
    """Returns JSON with all its texts cut, see `Tokenizer.cut`."""
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
