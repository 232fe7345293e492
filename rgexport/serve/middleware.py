"""What stands before every request: the key, the size of the body, the log, the figures."""

import asyncio
import hmac
import json
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rgexport.progress import note
from rgexport.serve.errors import INVALID, error_object
from rgexport.serve.metrics import Metrics

_BODY_SECONDS = 60.0
"""How long a part of a request may take to come."""
_OPEN = {"/health"}
"""Paths that need no key."""


class Guard:
    """An ASGI middleware; a stream passes through it piece by piece."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, body_bytes: int, metrics: Metrics, log: bool
    ) -> None:
        """See `app.Settings`."""
        self._app, self._key, self._most = app, api_key, body_bytes
        self._metrics, self._log = metrics, log
        self._too_large = f"the request is larger than {body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, size, whole = time.perf_counter(), 0, 0, False

        async def limited() -> Message:
            nonlocal size, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else _BODY_SECONDS)
            except TimeoutError:
                raise HTTPException(408, "the rest of the request does not come") from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._most:
                raise HTTPException(413, self._too_large)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refused(scope)
            if refused:
                await _answer(noted, *refused)
            else:
                await self._app(scope, limited, noted)
        finally:
            self._done(scope, status, time.perf_counter() - started)

    def _refused(self, scope: Scope) -> tuple[int, dict[str, Any]] | None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                return 401, error_object("the API key is missing or wrong", "authentication_error")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most:
            return 413, error_object(self._too_large, INVALID)
        return None

    def _done(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, status, seconds)
        if self._log:
            note(f"{scope['method']} {route} {status or 'left'} {1e3 * seconds:.0f} ms")


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
