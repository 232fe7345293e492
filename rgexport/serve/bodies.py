"""Bodies of requests: OpenAI's fields, and additions of llama-server and vLLM.

They are checked before they are parsed, off the event loop. Unknown fields are ignored.
"""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rgexport.serve.errors import InvalidBody, invalid_body, remove_description

MOST_CHOICES = 16
"""Maximum number of replies to one prompt."""

MOST_LOGPROBS = 20
"""Maximum number of the most likely tokens that are reported beside each token."""

MOST_STOPS = 16
"""Maximum number of stop strings."""

MOST_BIASES = 1024
"""Maximum number of tokens with a bias."""

MOST_DEPTH = 128
"""Maximum number of nested lists and objects in a body."""

MOST_OBJECTS = 200_000
"""Maximum number of lists and objects in a body."""

MOST_VALUES = 1 << 21
"""Maximum number of values in a body, with lists and objects."""

_INT64 = 2**63 - 1

FirstError = Field(fail_fast=True)
"""Ends the check of a list at its first error, instead of a million errors."""

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], FirstError]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, StringConstraints(max_length=1000)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

_NULL = {"type": "null"}
_ANNOTATIONS = {"title", "default", "description"}
"""Keywords of a JSON schema that restrict no value."""

_STRUCTURE = b'[]{},"'
_NO_STRUCTURE = bytes(byte for byte in range(256) if byte not in _STRUCTURE)
"""Bytes that are no part of JSON's structure."""


def _describe_body(schema: dict[str, Any]) -> None:
    """Changes the JSON schema of a body: fields that may be left out may be null, too."""
    remove_description(schema)
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name not in required:
            _allow_null(field)


def _allow_null(field: dict[str, Any]) -> None:
    """Adds null to the types of a field's JSON schema."""
    types = field.pop("anyOf", None)
    if not types:
        keywords = sorted(field.keys() - _ANNOTATIONS)
        only_type = {keyword: field.pop(keyword) for keyword in keywords}
        types = [only_type]
    if _NULL not in types:
        types = [*types, _NULL]
    field["anyOf"] = types


class _Body(BaseModel):
    """An object that a client sends; a field that is null counts as left out."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_describe_body)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class TextPart(_Body):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message of a conversation; its text may come in pieces."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FirstError]


class JsonSchema(_Body):
    """The JSON schema that a reply must fit."""

    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(_Body):
    """The format of a reply: any text, any JSON object, or JSON that fits `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Body):
    """Options of an answer that comes as events."""

    include_usage: bool = False


class GenerationBody(_Body):
    """The fields that chat and completion requests share.

    Attributes:
        top_k: vLLM's; -1 and 0 keep all tokens.
        min_p: vLLM's.
        repetition_penalty: vLLM's.
        repeat_penalty: llama-server's name for the same, which comes first.
        grammar: llama-server's, in GBNF or Lark.
        regex: a regular expression that the reply matches.
        id_slot: llama-server's; the number under which the conversation can be saved.
    """

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=_INT64)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] = 0.0
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: (
        StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS, fail_fast=True)] | None
    ) = None
    response_format: ResponseFormat | None = None
    grammar: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    regex: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    id_slot: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Prediction(_Body):
    """A text that the reply may repeat; it makes the reply faster where it does."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], FirstError]


class ChatRequest(GenerationBody):
    """The body of a chat request; `max_completion_tokens` comes before `max_tokens`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tools: Annotated[list[dict[str, Any]], FirstError] | None = None
    prediction: Prediction | None = None


class CompletionRequest(GenerationBody):
    """The body of a completion request; a prompt is a text, or its tokens."""

    prompt: str | Annotated[list[str], FirstError] | Ids | Annotated[list[Ids], FirstError]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None


class TokenizeRequest(_Body):
    """A text; `add_special` asks for BOS before its tokens."""

    content: str
    model: str = ""
    add_special: bool = False


class DetokenizeRequest(_Body):
    """The tokens of a text."""

    tokens: Ids
    model: str = ""


class TemplateRequest(_Body):
    """A conversation, to which the chat template is applied."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    model: str = ""


class SlotRequest(_Body):
    """The name of a saved state, and the model."""

    filename: FileName | None = None
    model: str = ""


class JsonRoute(APIRoute):
    """A route that lets the server parse and validate its argument `body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns FastAPI's handler, called with a body that is already parsed."""
        handle = super().get_route_handler()
        body_type = get_type_hints(self.endpoint).get("body")
        if body_type is None:
            return handle

        async def parse_and_handle(request: Request) -> Response:
            data = await request.body()
            if not data:
                return await handle(request)
            require_json(request.headers.get("content-type", ""))
            parsed = await request.app.state.server.parse(request, body_type, data)
            return await handle(_ParsedRequest(request, data, parsed))

        return parse_and_handle


class _ParsedRequest(Request):
    """A request that gives FastAPI a parsed body for the JSON, so that it parses nothing."""

    def __init__(self, request: Request, data: bytes, parsed: object) -> None:
        super().__init__(request.scope, request.receive)
        self._data = data
        self._parsed = parsed

    async def body(self) -> bytes:
        return self._data

    async def json(self) -> object:
        return self._parsed


def require_json(content_type: str) -> None:
    """Refuses other types: browsers send some of them from any page without asking the server."""
    media_type = content_type.partition(";")[0].strip().lower()
    if re.fullmatch(r"application/(\S+\+)?json", media_type):
        return
    type_text = repr(content_type) if content_type else "missing"
    raise InvalidBody(f"the body's type is {type_text}; send Content-Type: application/json")


def parse(body_type: Any, data: bytes) -> Any:
    """Returns a body as an object of `body_type`, a subclass of `_Body` or a union with one.

    Raises InvalidBody for data that are not JSON, have too many values or do not fit the type.
    """
    require_simple(data)
    try:
        # Half of a surrogate pair, which is no UTF-8, is accepted: the tokenizer replaces it.
        value = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise InvalidBody("the body is not JSON") from None
    try:
        return TypeAdapter(body_type).validate_python(value)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False)) from None


def require_simple(data: bytes) -> None:
    """Refuses JSON that is small as text and large, or slow, as objects, before it is parsed.

    Raises InvalidBody if it has more levels, lists and objects, or values than the limits.
    """
    structure = _structure(data)
    is_opening = np.isin(structure, [ord("["), ord("{")])
    is_closing = np.isin(structure, [ord("]"), ord("}")])
    is_comma = structure == ord(",")

    depths = np.cumsum(is_opening.astype(np.int32) - is_closing, dtype=np.int32)
    depth = int(depths.max(initial=0))
    objects = int(np.count_nonzero(is_opening))
    values = objects + int(np.count_nonzero(is_comma))

    _require_at_most(depth, MOST_DEPTH, "levels of lists and objects")
    _require_at_most(objects, MOST_OBJECTS, "lists and objects")
    _require_at_most(values, MOST_VALUES, "values")


def _structure(data: bytes) -> np.ndarray:
    """Returns brackets, braces and commas outside of strings, and closing quotes, as uint8."""
    without_escapes = data.replace(rb"\\", b"").replace(rb"\"", b"")
    characters = np.frombuffer(without_escapes.translate(None, _NO_STRUCTURE), np.uint8)
    is_quote = characters == ord('"')
    is_in_string = np.logical_xor.accumulate(is_quote)
    structure: np.ndarray = characters[~is_in_string]
    return structure


def _require_at_most(count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise InvalidBody(f"the body has more than {limit} {unit}")
