"""Limits on connections: their number, and the time until each sends a request.

uvicorn has neither a time limit for headers nor a limit per address. Without them, clients that
connect and say nothing keep the server's sockets for ever.
"""

import asyncio
import json
from dataclasses import dataclass, field

from uvicorn.protocols.http.h11_impl import H11Protocol

from rgexport.serve.errors import BUSY, error_object

HEADER_SECONDS = 10.0
"""Time in which a connection must send the headers of a request, once it is open or has begun."""


@dataclass
class Connections:
    """All connections of a server, the oldest first; no limit per address if that is 0."""

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
    """A uvicorn connection that is counted, and must send a request in time."""

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
    """Returns the connection class for uvicorn, which counts in `connections`."""
    return type("CountedConnection", (Connection,), {"connections_of_server": connections})


def _full() -> bytes:
    body = json.dumps(error_object("there are too many connections; try again later", BUSY))
    lines = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
