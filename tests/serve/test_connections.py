"""Clients that connect and say nothing, say it slowly, or say two things at once."""

import contextlib
import socket
import time
from unittest.mock import Mock

import pytest

from rgexport.serve import middleware
from rgexport.serve.connections import Connections
from tests.serve.conftest import connect, get, until

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
QUICK = 0.3
"""Seconds for headers, in a test that waits until they have passed."""


@pytest.fixture
def hasty(serve):
    with serve(connections=Connections(header_seconds=QUICK)) as server:
        yield server


@contextlib.contextmanager
def many(server, count):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(count)]


def rest_of(connection: socket.socket) -> bytes:
    """Waits for the end of a connection."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1000):
            answer += part
    return answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc", HEALTH + b"GET /hea"])
def test_headers_that_do_not_come_end_the_connection(sent, hasty):
    with connect(hasty, sent) as connection:
        assert rest_of(connection).count(b" 200 OK") == sent.count(HEALTH)


def drip(connection: socket.socket, byte: bytes) -> bytes:
    """Sends a byte now and then until there is an answer, or the end."""
    connection.settimeout(0.02)
    with contextlib.suppress(ConnectionError):
        for _ in range(3000):
            connection.sendall(byte)
            with contextlib.suppress(TimeoutError):
                return connection.recv(1000)
        pytest.fail("it is still open")
    return b""


def test_headers_that_come_slowly_end_the_connection(hasty):
    """Each byte would start a time limit of the pauses again."""
    with connect(hasty, HEALTH[:-2] + b"X: ") as connection:
        assert drip(connection, b"x") == b""


def test_a_request_may_take_longer_than_its_headers(hasty):
    with connect(hasty, HEAD + b"Content-Length: 16\r\n\r\n") as connection:
        time.sleep(2 * QUICK)
        connection.sendall(b'{"content": "x"}')
        assert b"200 OK" in connection.recv(1000)


def test_a_body_must_come_in_time_as_a_whole(serve, monkeypatch):
    monkeypatch.setattr(middleware, "_BODY_SECONDS", QUICK)
    with serve() as server, connect(server, HEAD + b"Content-Length: 100000\r\n\r\n") as connection:
        answer = drip(connection, b" ")
        assert b" 408 " in answer and b"application/json" in answer
        connection.settimeout(60)
        rest_of(connection)


@pytest.mark.parametrize("per_address", [0, 300])
def test_silent_connections_make_room(per_address, serve):
    """No time has passed, and still others are served."""
    limits = Connections(300, per_address, header_seconds=600)
    with serve(connections=limits) as server, many(server, 300) as silent:
        until(lambda: len(limits.open) == 300)
        assert [get(server, "/health").status_code for _ in range(3)] == [200] * 3
        assert rest_of(silent[0]) == b"" and len(limits.open) <= 300


@pytest.mark.parametrize("limits", [Connections(3, 0), Connections(100, 3)])
def test_connections_that_ask_for_something_stay(limits, serve):
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
        assert get(server, "/health").status_code == 200, "they are silent now"
    assert not limits.open


def test_addresses_have_limits_of_their_own():
    limits = Connections(10, 2)
    limits.open = dict.fromkeys(Mock(address=address, is_silent=False) for address in "aab")
    assert not limits.make_room("a")
    assert limits.make_room("b") and limits.make_room("c")


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 16\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 16\r\n",
        b"Content-Length: 16\r\nContent-Length: 17\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding : chunked\r\nContent-Length: 16\r\n",
    ],
)
def test_a_request_with_two_lengths_is_refused_and_closed(framing, server):
    """A proxy might see another request in what follows (request smuggling)."""
    second = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server, HEAD + framing + b"\r\n0\r\n\r\n" + second) as connection:
        answer = rest_of(connection)
        assert answer.count(b"HTTP/1.1 ") == 1 and b"rgexport_" not in answer
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
