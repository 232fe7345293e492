"""Middlewares around every request: metrics and log; API key, size and time limits; origins.

A browser sends the requests of any page to this machine, and only hides the answer from the page.
So requests of pages that are not allowed are refused before anything runs.
"""

import asyncio
import hmac
import time
import traceback
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rgexport.progress import note, warn
from rgexport.serve.errors import INVALID, SERVER, ServerEnds, error_response
from rgexport.serve.host_names import is_allowed
from rgexport.serve.monitoring import Metrics

_BODY_SECONDS = 60.0
"""Time in which a whole request must arrive."""
_OPEN = {"/health"}
"""Paths that need no key."""
_OTHER_SITES = {"cross-site", "same-site"}
"""Values of `Sec-Fetch-Site` for pages of other origins."""


class Record:
    """Counts answers and logs a line for each, without its text; an ASGI middleware."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, log: bool) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, status, seconds)
            if self._log:
                note(f"{scope['method']} {route} {status or 'left'} {1e3 * seconds:.0f} ms")


class Guard:
    """Checks key, size and time, and answers unexpected errors; an ASGI middleware."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_bytes: int) -> None:
        self._app, self._key, self._body_bytes = app, api_key, body_bytes
        self._too_large = f"the request is larger than {body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await refusal(scope, receive, send)
            return
        has_started = False

        async def send_noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, self._limited(receive), send_noted)
        except asyncio.CancelledError:  # uvicorn's, when the time of running replies is over
            if not has_started:
                await error_response(503, str(ServerEnds()), SERVER)(scope, receive, send)
        except Exception as error:
            if has_started:
                raise
            warn(f"{scope['method']} {scope['path']}: {_origin(error)}")
            failure = error_response(500, "the server failed; its log says why", SERVER)
            await failure(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # A proxy in front may believe the other one, and see another request in the rest.
            message = "Content-Length and Transfer-Encoding exclude each other; send one of them"
            response = error_response(400, message)
            response.headers["Connection"] = "close"
            return response
        if self._key is not None and scope["path"] not in _OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(key.strip(), self._key.encode())
            if scheme.lower() != b"bearer" or not is_right:
                message = "the API key is missing or wrong"
                response = error_response(401, message, "authentication_error")
                response.headers["WWW-Authenticate"] = "Bearer"
                return response
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._body_bytes:
            return error_response(413, self._too_large, INVALID)
        return None

    def _limited(self, receive: Receive) -> Receive:
        end = asyncio.get_running_loop().time() + _BODY_SECONDS
        size, is_whole = 0, False

        async def limited() -> Message:
            nonlocal size, is_whole
            try:
                async with asyncio.timeout_at(None if is_whole else end):
                    message = await receive()
            except TimeoutError:
                late = f"the request did not arrive within {_BODY_SECONDS:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            is_whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited


def _origin(error: Exception) -> str:
    """Returns the error's type and origin; its message may hold a user's text."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.filename}:{last.lineno}"


class Origins:
    """Refuses foreign names and pages; an ASGI middleware."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], pages: Collection[str]) -> None:
        self._app, self._hosts, self._pages = app, hosts, pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complaint = self._complaint(scope) if scope["type"] in ("http", "websocket") else None
        if complaint is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error_response(403, complaint, "permission_error")(scope, receive, send)

    def _complaint(self, scope: Scope) -> str | None:
        hosts = _values(scope, b"host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            return f"there are {len(hosts)} Host headers; expected one"
        host = hosts[0] if hosts else ""
        if hosts and not is_allowed(host, self._hosts):
            return f"the Host {host!r} is not allowed here; --allowed-host NAME allows it"
        if scope.get("method") == "OPTIONS":
            return None  # CORS answers it
        origins = _values(scope, b"origin")
        if not all(self._is_ours(origin, host) for origin in origins):
            foreign = repr(origins[0])
        elif not origins and _is_of_other_site(scope):
            foreign = "another origin"
        else:
            return None
        return f"pages of {foreign} may not use this server; --cors-origin ORIGIN allows them"

    def _is_ours(self, origin: str, host: str) -> bool:
        is_same = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        return is_same or origin in self._pages or "*" in self._pages


def _is_of_other_site(scope: Scope) -> bool:
    """Returns whether a page of another origin sends this, other than by a link."""
    if not _OTHER_SITES.intersection(_values(scope, b"sec-fetch-site")):
        return False
    is_link = scope.get("method") == "GET" and _values(scope, b"sec-fetch-mode") == ["navigate"]
    return not (is_link and _values(scope, b"sec-fetch-dest") == ["document"])


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
