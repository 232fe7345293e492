"""Limits on connections, and middlewares around every request.

uvicorn has neither a time limit for headers nor a limit of connections per address: clients that
say nothing would keep the server's sockets for ever.

A browser sends the requests of any page to this machine, and only hides the answer from the page.
So requests of pages that are not allowed are refused before anything runs.
"""

import asyncio
import hmac
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rgexport.progress import note, warn
from rgexport.serve.errors import BUSY, SERVER, ServerEnds, error_response
from rgexport.serve.host_names import is_allowed
from rgexport.serve.monitoring import Metrics

HEADER_SECONDS = 10.0
"""Time in which a connection must send the headers of a request, once it is open or has begun."""
_BODY_SECONDS = 60.0  # time in which a whole request must arrive
_OPEN = {"/health"}
_OTHER_SITES = {"cross-site", "same-site"}
"""Values of `Sec-Fetch-Site` for pages of other origins."""


@dataclass
class Connections:
    """All connections of a server, the oldest first; 0 is no limit per address."""

    most: int = 1024
    most_per_address: int = 0
    header_seconds: float = HEADER_SECONDS
    open: dict["Connection", None] = field(default_factory=dict)

    def make_space(self, address: str) -> bool:
        same_address = [c for c in self.open if c.address == address]
        most_same = self.most_per_address or self.most
        return _has_space(same_address, most_same) and _has_space([*self.open], self.most)


def _has_space(connections: list["Connection"], most: int) -> bool:
    """Returns whether one more is allowed; closes the oldest silent one if necessary."""
    if len(connections) >= most:
        silent = next((c for c in connections if c.is_silent), None)
        if silent is None:
            return False
        silent.drop()
    return True


class Connection(H11Protocol):
    connections_of_server: Connections
    """Set by `protocol`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_timer: asyncio.TimerHandle | None = None
        self.address = self.client[0] if self.client else ""
        if not self.connections_of_server.make_space(self.address):
            transport.write(_full())
            transport.close()
            return
        self.connections_of_server.open[self] = None
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.connections_of_server.open.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_silent:
            self._stop_waiting()
        elif self._header_timer is None:
            self._await_headers()

    @property
    def is_silent(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def drop(self) -> None:
        self._stop_waiting()
        self.connections_of_server.open.pop(self, None)
        self.transport.abort()

    def _await_headers(self) -> None:
        seconds = self.connections_of_server.header_seconds
        self._header_timer = self.loop.call_later(seconds, self.drop)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def protocol(connections: Connections) -> type[Connection]:
    return type("CountedConnection", (Connection,), {"connections_of_server": connections})


def _full() -> bytes:
    message = "there are too many connections; try again later"
    response = error_response(503, message, BUSY, Retry_After="1", Connection="close")
    headers = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n%s\r\n%s" % (headers, response.body)


class Record:
    """Counts answers and logs a line for each, without its text; an ASGI middleware."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, log: bool) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            last = traceback.extract_tb(error.__traceback__)[-1]
            origin = f"{type(error).__name__} at {last.filename}:{last.lineno}"
            warn(f"{scope['method']} {scope['path']}: {origin}")  # messages may hold users' texts
            failure = error_response(500, "the server failed; its log says why", SERVER)
            await failure(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # A proxy in front may believe the other one, and see another request in the rest.
            message = "Content-Length and Transfer-Encoding exclude each other; send one of them"
            return error_response(400, message, Connection="close")
        if self._key is not None and scope["path"] not in _OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            is_right = hmac.compare_digest(key.strip(), self._key.encode())
            if scheme.lower() != b"bearer" or not is_right:
                message, kind = "the API key is missing or wrong", "authentication_error"
                return error_response(401, message, kind, WWW_Authenticate="Bearer")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._body_bytes:
            return error_response(413, self._too_large)
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


class Origins:
    def __init__(self, app: ASGIApp, *, hosts: Collection[str], pages: Collection[str]) -> None:
        self._app, self._hosts, self._pages = app, hosts, pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (complaint := self._complaint(scope)) is None:
            await self._app(scope, receive, send)
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
    if not _OTHER_SITES.intersection(_values(scope, b"sec-fetch-site")):
        return False
    is_link = scope.get("method") == "GET" and _values(scope, b"sec-fetch-mode") == ["navigate"]
    return not (is_link and _values(scope, b"sec-fetch-dest") == ["document"])


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
