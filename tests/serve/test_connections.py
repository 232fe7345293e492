"""Clients that connect and say nothing, say it slowly, or say two things at once."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from rgexport.serve import middleware
from rgexport.serve.app import Settings
from rgexport.serve.connections import Connections
from tests.serve.conftest import Serve, Served

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
QUICK = 0.3
"""Seconds for headers, in a test that waits until they have passed."""


def connect(server: Served) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)))
    opened.settimeout(60)
    return opened


@contextlib.contextmanager
def many(server: Served, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(count)]


def is_closed(connection: socket.socket) -> bool:
    """Waits for an answer, or the end."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(1000) == b""
    return True


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_healthy(server: Served) -> bool:
    return httpx.get(f"{server.url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_headers_that_do_not_come_end_the_connection(sent: bytes, serve: Serve) -> None:
    with (
        serve(connections=Connections(header_seconds=QUICK)) as server,
        connect(server) as connection,
    ):
        connection.sendall(sent)
        assert is_closed(connection)


def test_headers_that_come_slowly_end_the_connection(serve: Serve) -> None:
    """Each byte would start a time limit of the pauses again."""
    with (
        serve(connections=Connections(header_seconds=QUICK)) as server,
        connect(server) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        connection.settimeout(0.02)
        for _ in range(3000):
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                assert connection.recv(100) == b""
                return
        pytest.fail("it is still open")


def test_the_next_request_of_a_connection_has_the_same_limit(serve: Serve) -> None:
    with (
        serve(connections=Connections(header_seconds=QUICK)) as server,
        connect(server) as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)
        connection.sendall(b"GET /hea")
        assert is_closed(connection)


def test_a_request_may_take_longer_than_its_headers(serve: Serve) -> None:
    with (
        serve(connections=Connections(header_seconds=QUICK)) as server,
        connect(server) as connection,
    ):
        connection.sendall(HEAD + b"Content-Length: 16\r\n\r\n")
        time.sleep(2 * QUICK)
        connection.sendall(b'{"content": "x"}')
        assert b"200 OK" in connection.recv(1000)


def test_a_body_must_come_in_time_as_a_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_SECONDS", QUICK)
    with serve() as server, connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        connection.settimeout(0.02)
        answer = b""
        for _ in range(3000):
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1000)
                break
            connection.sendall(b" ")
        connection.settimeout(60)
        assert b" 408 " in answer and b"application/json" in answer
        with contextlib.suppress(ConnectionError):
            while connection.recv(1000):
                pass


@pytest.mark.parametrize("per_address", [0, 300])
def test_silent_connections_make_room(per_address: int, serve: Serve) -> None:
    """No time has passed, and still others are served."""
    limits = Connections(300, per_address, header_seconds=600)
    with serve(connections=limits) as server, many(server, 300) as silent:
        until(lambda: len(limits.open) == 300)
        assert all(is_healthy(server) for _ in range(3))
        assert is_closed(silent[0])
        assert len(limits.open) <= 300


@pytest.mark.parametrize("limits", [Connections(3, 0), Connections(100, 3)])
def test_connections_that_ask_for_something_stay(limits: Connections, serve: Serve) -> None:
    with serve(connections=limits) as server, many(server, 3) as busy:
        for each in busy:
            each.sendall(HEAD + b"Content-Length: 16\r\n\r\n")
        until(lambda: [c.is_silent for c in limits.open] == [False] * 3)
        with connect(server) as fourth:
            answer = fourth.recv(1000)
            assert answer.startswith(b"HTTP/1.1 503 ") and b'"error"' in answer
        for each in busy:
            each.sendall(b'{"content": "x"}')
            assert b"200 OK" in each.recv(1000)
        assert is_healthy(server), "they are silent now"
    assert not limits.open


def test_addresses_have_limits_of_their_own() -> None:
    class Asking:
        def __init__(self, address: str) -> None:
            self.address, self.is_silent = address, False

    limits = Connections(10, 2)
    limits.open = dict.fromkeys([Asking("a"), Asking("a"), Asking("b")])  # type: ignore[arg-type]
    assert not limits.make_room("a")
    assert limits.make_room("b") and limits.make_room("c")


BOTH = [
    b"Content-Length: 16\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 16\r\n",
    b"Content-Length: 16\r\nContent-Length: 17\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding : chunked\r\nContent-Length: 16\r\n",
]


@pytest.mark.parametrize("framing", BOTH)
def test_a_request_with_two_lengths_is_refused_and_closed(framing: bytes, serve: Serve) -> None:
    """A proxy might see another request in what follows (request smuggling)."""
    second = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serve(Settings(log=False)) as server, connect(server) as connection:
        connection.sendall(HEAD + framing + b"\r\n0\r\n\r\n" + second)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1000):
                answer += part
        assert answer.count(b"HTTP/1.1 ") == 1 and b"rgexport_" not in answer
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
