"""Limits on connections: how many there are, and how long each may take to ask for something.

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
    """All connections of a server.

    Attributes:
        most: how many there may be.
        most_per_address: how many from one address; 0 for as many as there may be.
        header_seconds: see `HEADER_SECONDS`.
    """

    most: int = 1024
    most_per_address: int = 0
    header_seconds: float = HEADER_SECONDS
    open: dict["Connection", None] = field(default_factory=dict)
    """The connections, the oldest first."""

    def make_room(self, address: str) -> bool:
        """Returns whether one more may come; closes a silent one if need be."""
        same_address = [c for c in self.open if c.address == address]
        most_same = self.most_per_address or self.most
        return _has_room(same_address, most_same) and _has_room([*self.open], self.most)


def _has_room(connections: list["Connection"], most: int) -> bool:
    """Returns whether one more may come, after the oldest silent one was closed if need be."""
    if len(connections) >= most:
        silent = next((c for c in connections if c.is_silent), None)
        if silent is None:
            return False
        silent.drop()
    return True


class Connection(H11Protocol):
    """A connection of uvicorn's that counts, and that must ask in time."""

    connections_of_server: Connections
    """Set by `protocol`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection if there is room, else answers 503 to it."""
        super().connection_made(transport)
        self._header_timer: asyncio.TimerHandle | None = None
        self.address = self.client[0] if self.client else ""
        if not self.connections_of_server.make_room(self.address):
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
        """Takes what came; headers that are not complete must be so in time."""
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
    """Returns the class of connections that uvicorn makes, which count as these."""
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
