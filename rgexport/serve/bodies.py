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

from rgexport.serve.errors import InvalidBody, invalid_body

MOST_CHOICES, MOST_LOGPROBS, MOST_STOPS, MOST_BIASES = 16, 20, 16, 1024
_INT64 = 2**63 - 1

FirstError = Field(fail_fast=True)
"""Ends the check of a list at its first error, instead of a million errors."""
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], FirstError]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, StringConstraints(max_length=1000)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
MOST_DEPTH, MOST_OBJECTS, MOST_VALUES = 128, 200_000, 1 << 21
"""Nested lists and objects, all of them, and their values, which a body may have."""
_NO_SIGNS = bytes(byte for byte in range(256) if byte not in b'[]{},"')
"""Bytes that are no part of JSON's structure."""


def _allow_null(schema: dict[str, Any]) -> None:
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            rules = field.keys() - {"title", "default", "description"}
            types = field.pop("anyOf", None) or [{rule: field.pop(rule) for rule in sorted(rules)}]
            field["anyOf"] = types if {"type": "null"} in types else [*types, {"type": "null"}]


class _Body(BaseModel):
    """An object that a client sends; a field that is null counts as left out."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], FirstError]


class JsonSchema(_Body):
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Body):
    include_usage: bool = False


class GenerationBody(_Body):
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
    type: Literal["content"]
    content: str | Annotated[list[TextPart], FirstError]


class ChatRequest(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tools: Annotated[list[dict[str, Any]], FirstError] | None = None
    prediction: Prediction | None = None


class CompletionRequest(GenerationBody):
    prompt: str | Annotated[list[str], FirstError] | Ids | Annotated[list[Ids], FirstError]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None


class TokenizeRequest(_Body):
    content: str
    model: str = ""
    add_special: bool = False


class DetokenizeRequest(_Body):
    tokens: Ids
    model: str = ""


class TemplateRequest(_Body):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    model: str = ""


class SlotRequest(_Body):
    filename: FileName | None = None
    model: str = ""


class JsonRoute(APIRoute):
    """A route that lets the server parse and validate its argument `body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, kind = super().get_route_handler(), get_type_hints(self.endpoint).get("body")
        if kind is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            data = await request.body()
            if not data:
                return await handle(request)
            require_json(request.headers.get("content-type", ""))
            parsed = await request.app.state.server.parse(request, kind, data)
            return await handle(_ParsedRequest(request, data, parsed))

        return read_and_handle


class _ParsedRequest(Request):
    def __init__(self, request: Request, data: bytes, parsed: object) -> None:
        super().__init__(request.scope, request.receive)
        self._data, self._parsed = data, parsed

    async def body(self) -> bytes:
        return self._data

    async def json(self) -> object:
        return self._parsed


def require_json(content_type: str) -> None:
    """Refuses other types: browsers send some of them from any page without asking the server."""
    kind = content_type.partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(\S+\+)?json", kind):
        type_text = repr(content_type) if content_type else "missing"
        raise InvalidBody(f"the body's type is {type_text}; send Content-Type: application/json")


def parse(kind: Any, data: bytes) -> Any:
    require_simple(data)
    try:
        value = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise InvalidBody("the body is not JSON") from None
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False)) from None


def require_simple(data: bytes) -> None:
    """Refuses JSON that is small as text and large, or slow, as objects, before it is parsed."""
    signs = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_SIGNS)
    structure = np.frombuffer(signs, np.uint8)
    structure = structure[~np.logical_xor.accumulate(structure == ord('"'))]  # outside of strings
    opening, closing = np.isin(structure, [*b"[{"]), np.isin(structure, [*b"]}"])
    depth = np.cumsum(opening.astype(np.int32) - closing, dtype=np.int32).max(initial=0)
    objects, commas = np.count_nonzero(opening), np.count_nonzero(structure == ord(","))
    for count, most, what in (
        (depth, MOST_DEPTH, "levels of lists and objects"),
        (objects, MOST_OBJECTS, "lists and objects"),
        (objects + commas, MOST_VALUES, "values"),
    ):
        if count > most:
            raise InvalidBody(f"the body has more than {most} {what}")
