"""Bodies of requests: checked before they are parsed, and parsed off the event loop."""

import email.message
import json
from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from rgexport.serve.errors import InvalidBody, invalid_body

MOST_DEPTH, MOST_OBJECTS, MOST_VALUES = 128, 200_000, 1 << 21
"""Nested lists and objects, all of them, and their values, which a body may have."""
_PIECE = 1 << 16
"""Bytes that are checked at once."""
_QUOTE, _OPENING, _CLOSING, _COMMA = 1, 2, 3, 4
_KINDS = np.zeros(256, np.uint8)
"""The kind of each byte that is part of JSON's structure; 0 for others."""
for _kind, _bytes in {_QUOTE: b'"', _OPENING: b"[{", _CLOSING: b"]}", _COMMA: b","}.items():
    _KINDS[list(_bytes)] = _kind

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRoute(APIRoute):
    """A route that lets the server's `Offload` parse and validate its argument `body`."""

    def get_route_handler(self) -> _Handler:
        handle, kind = super().get_route_handler(), get_type_hints(self.endpoint).get("body")
        if kind is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            data = await request.body()
            if not data:
                return await handle(request)
            require_json(request.headers.get("content-type", ""))
            parsed = await request.app.state.server.offload.parse(request, kind, data)
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
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    is_json = subtype == "json" or subtype.endswith("+json")
    if not content_type or message.get_content_maintype() != "application" or not is_json:
        type_text = repr(content_type) if content_type else "missing"
        raise InvalidBody(f"the body's type is {type_text}; is Content-Type application/json?")


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
    text = np.frombuffer(data.replace(rb"\\", b"..").replace(rb"\"", b".."), np.uint8)
    inside, depth, objects, values = False, 0, 0, 0
    for start in range(0, len(text), _PIECE):
        kinds = _KINDS[text[start : start + _PIECE]]
        kinds = kinds[kinds != 0]
        in_string = np.logical_xor.accumulate(kinds == _QUOTE) ^ inside
        inside = bool(in_string[-1]) if len(in_string) else inside
        kinds = kinds[~in_string]
        opening, closing = kinds == _OPENING, kinds == _CLOSING
        depths = depth + np.cumsum(opening.astype(np.int64) - closing)
        objects += int(np.count_nonzero(opening))
        values += int(np.count_nonzero(kinds == _COMMA))
        depth = int(depths[-1]) if len(depths) else depth
        for count, most, what in (
            (int(depths.max(initial=0)), MOST_DEPTH, "levels of lists and objects"),
            (objects, MOST_OBJECTS, "lists and objects"),
            (objects + values, MOST_VALUES, "values"),
        ):
            if count > most:
                raise InvalidBody(f"the body has more than {most} {what}")
