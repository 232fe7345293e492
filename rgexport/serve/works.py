"""From the fields of a request to the replies that it asks for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rgexport.chat.model import Model
from rgexport.chat.prompts import Prompt
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.sampling import Sampling
from rgexport.chat.template import Message
from rgexport.errors import RequestError
from rgexport.serve.clients import Client
from rgexport.serve.exchange import Limits, Work
from rgexport.serve.grammar import GrammarSource, json_source
from rgexport.serve.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Generation,
    Prediction,
)

_ROLES = {"developer": "system"}
_MOST_PROMPTS = 64
_MOST_SCORED_TOKENS = 1 << 16
_COMPLETION_TOKENS = 16
"""Tokens of a completion that does not say how many, as OpenAI has it."""


def messages_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """Turns as a template takes them."""
    return [
        {"role": _ROLES.get(message.role, message.role), "content": _text(message)}
        for message in messages
    ]


def chat_works(model: Model, body: ChatRequest, client: Client, limits: Limits) -> list[Work]:
    """The replies that a chat asks for.

    Raises:
        RequestError: the template refuses the messages, or a field asks for what there is not.
    """
    model.require_chat()
    if body.tools and "tools" not in model.template.source:
        raise RequestError("tools: the chat template of this model has none; leave tools out")
    prompt = model.conversation_prompt(
        messages_of(body.messages), tools=body.tools or None, namespace=client.namespace
    )
    _require_fitting([prompt], limits)
    most = body.max_completion_tokens or body.max_tokens
    logprobs = body.top_logprobs if body.logprobs else None
    options = _options(body, most, logprobs, client, limits)
    if body.prediction:
        draft = model.draft_of(_text(body.prediction))
        if len(draft) > limits.prompt_tokens:
            raise RequestError(
                f"prediction has {len(draft)} tokens; this server takes up to "
                f"{limits.prompt_tokens}"
            )
        options = replace(options, draft=draft)
    return _works([prompt], body, options)


def completion_works(
    model: Model, body: CompletionRequest, client: Client, limits: Limits
) -> list[Work]:
    """The replies that a completion asks for: `n` of each prompt.

    Raises:
        RequestError: a prompt is empty, or a field asks for what there is not.
    """
    if body.suffix:
        raise RequestError("suffix: this model cannot fill a gap; leave suffix out")
    if body.best_of not in (None, body.n):
        raise RequestError("best_of: there is none; leave it out, or set it to n")
    prompts = [Prompt(ids) for ids in _prompts(model, body.prompt)]
    _require_fitting(prompts, limits)
    most = body.max_tokens or _COMPLETION_TOKENS
    options = _options(body, most, body.logprobs, client, limits)
    if body.echo and body.logprobs is not None:
        _require_scorable(prompts)
        options = replace(options, prompt_logprobs=True)
    works = _works(prompts, body, options)
    if body.echo:
        return [replace(w, before=model.tokenizer.decode(w.prompt.ids)) for w in works]
    return works


def _works(prompts: Sequence[Prompt], body: Generation, options: ReplyOptions) -> list[Work]:
    """Returns `n` replies to each prompt, each with a seed of its own."""
    grammar = _grammar_source(body)
    choices = [replace(options, sampling=_sampling(body, choice)) for choice in range(body.n)]
    return [Work(prompt, choice, grammar=grammar) for prompt in prompts for choice in choices]


def _options(
    body: Generation, most: int | None, logprobs: int | None, client: Client, limits: Limits
) -> ReplyOptions:
    return ReplyOptions(
        max_new_tokens=min(most or limits.new_tokens, limits.new_tokens),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        logprobs=logprobs,
        client=client.name,
        namespace=client.namespace,
    )


def _require_fitting(prompts: Sequence[Prompt], limits: Limits) -> None:
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > limits.prompt_tokens:
        raise RequestError(
            f"the prompt has {longest} tokens; this server takes up to {limits.prompt_tokens}"
        )


def _require_scorable(prompts: Sequence[Prompt]) -> None:
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest > _MOST_SCORED_TOKENS:
        raise RequestError(
            f"echo: the prompt has {longest} tokens; log probabilities are reported of up to "
            f"{_MOST_SCORED_TOKENS}; leave echo or logprobs out"
        )


def _sampling(body: Generation, choice: int) -> Sampling:
    """How tokens are chosen; each choice has another seed."""
    try:
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    except ValueError:
        raise RequestError("logit_bias: its keys are not token ids") from None
    seed = None if body.seed is None else (body.seed + choice) % 2**63
    return Sampling(
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repeat_penalty or body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=bias,
        seed=seed,
    )


def _grammar_source(body: Generation) -> GrammarSource | None:
    """Returns the grammar of the one field that has one."""
    form = body.response_format
    wanted = {
        "response_format": form is not None and form.type != "text",
        "grammar": body.grammar is not None,
        "regex": body.regex is not None,
    }
    if sum(wanted.values()) > 1:
        raise RequestError(f"{' and '.join(n for n, w in wanted.items() if w)}: give only one")
    if body.grammar is not None:
        return GrammarSource("grammar", body.grammar)
    if body.regex is not None:
        return GrammarSource("regex", body.regex)
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.json_schema is None:
        raise RequestError("response_format: its json_schema is missing")
    return json_source(form.json_schema.schema_ if form.json_schema else None)


def _prompts(
    model: Model, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    if isinstance(prompt, str):
        return [model.text_ids(prompt)]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    found = [model.text_ids(each) if isinstance(each, str) else _ids(each) for each in prompt]
    if not found or len(found) > _MOST_PROMPTS:
        raise RequestError(f"prompt: {len(found)} prompts; expected 1 to {_MOST_PROMPTS}")
    return found


def _ids(prompt: Any) -> list[int]:
    return [int(token) for token in prompt]


def _text(message: ChatMessage | Prediction) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)
