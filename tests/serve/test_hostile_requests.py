"""Requests of foreign pages, bodies that are large as objects, and connections that stay silent."""

import contextlib
import json
import time
from unittest.mock import Mock

import httpx
import pytest

from rgexport.chat.prompts import ChatTemplate
from rgexport.serve import bodies, endpoints, guards
from rgexport.serve.app import _own_names
from rgexport.serve.bodies import require_simple
from rgexport.serve.errors import InvalidBody
from rgexport.serve.guards import Connections
from rgexport.serve.server import ServerSettings
from tests.serve.conftest import CHAT, COMPLETE, error_of, until

ASK = COMPLETE, b'{"prompt": "hello", "max_tokens": 2}'
ASK_CHAT = CHAT, b'{"messages": [{"role": "user", "content": "hello"}]}'
ERASE = "/slots/0?action=erase", b""
TOKENIZE, DETOKENIZE = ("/tokenize", b'{"content": "hello"}'), ("/detokenize", b'{"tokens": [5]}')
ROUTES = [ASK, ASK_CHAT, TOKENIZE, DETOKENIZE, ("/apply-template", ASK_CHAT[1]), ERASE]
PAGE = "https://a.example"
OTHER_PAGES = [
    *({"Origin": origin} for origin in (PAGE, "null", "http://[::1", "http://localhost:1")),
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
]
FOREIGN_HOSTS = ["evil.test:8080", "127.0.0.1.evil.test", "", "a b", "user@localhost"]
FOREIGN_HOSTS += ["localhost:80:80", "localhost:port", "[evil.test]"]
HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
QUICK = 0.3  # seconds for headers, in a test that waits until they have passed


@pytest.fixture
def unasked(server):
    """Checks that nothing was asked of the model."""
    before = server.model.scheduler.counters.requests
    yield
    assert server.model.scheduler.counters.requests == before


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_is_refused(host, server):
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert "Host" in error_of(server.post(*ASK, **headers), 403)
    for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/none"):
        assert server.get(path, Host=host).status_code == 403


def test_names_that_are_allowed(serve, server):
    assert "*" not in _own_names("0.0.0.0", None) and _own_names("0.0.0.0", "sesame") == {"*"}
    for host in ("localhost", "LOCALHOST.:9", "127.0.0.1", "[::1]:8080"):
        assert server.get("/health", Host=host).status_code == 200
    with serve(ServerSettings(log=False, allowed_hosts=("chat.example",))) as server:
        named = {"Host": "chat.example", "Origin": "https://chat.example"}
        assert server.post(*ASK, **named).status_code == 200
        assert server.post(*ASK, Host="chat.example.evil").status_code == 403
    with serve(ServerSettings(log=False, allowed_hosts=("*",))) as server:
        assert server.post(*ASK, Host="evil.test").status_code == 200


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("headers", OTHER_PAGES, ids=lambda headers: " ".join(headers.values()))
def test_pages_of_other_origins_run_nothing(headers, server):
    for route in ROUTES:
        assert "--cors-origin" in error_of(server.post(*route, **headers), 403)


def test_what_pages_may_do(server):
    """The server's own page may ask; other pages erase nothing, show no image, but may link."""
    allowed = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    for route in ROUTES[:-1]:
        assert server.post(*route, **allowed).status_code == 200
    assert server.post(*ERASE, Origin=PAGE).status_code == 403
    assert server.post(*ERASE, **allowed).json()["n_erased"] > 0
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert server.get("/metrics", **image).status_code == 403
    link = image | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.get("/openapi.json", **link).status_code == 200


@pytest.mark.usefixtures("unasked")
def test_a_body_must_be_json(server):
    for path, body in ROUTES[:-1]:
        for kind in ("", "text/plain", "text/json", "multipart/json"):
            headers = {"Content-Type": kind} if kind else {}
            answer = httpx.post(server.url + path, content=body, headers=headers, timeout=60)
            assert "Content-Type: application/json" in error_of(answer)


def test_an_allowed_page_may_and_reads_errors_too(serve):
    with serve(ServerSettings(log=False, cors_origins=(PAGE,), api_key="sesame")) as server:
        key = {"Authorization": "Bearer sesame"}
        answers = {
            200: server.post(*ASK, Origin=PAGE, **{"Sec-Fetch-Site": "cross-site"}, **key),
            400: server.post("/tokenize", b"{", Origin=PAGE, **key),
            401: server.post(*ASK, Origin=PAGE),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
        for origin, status in {PAGE: 200, "https://b.example": 400}.items():
            preflight = {"Access-Control-Request-Method": "POST", "Origin": origin}
            answer = httpx.options(server.url + COMPLETE, headers=preflight)
            assert answer.status_code == status
            assert ("access-control-allow-origin" in answer.headers) == (status == 200)
        assert server.post(*ASK, Origin="https://b.example", **key).status_code == 403


@pytest.mark.parametrize(
    ("body", "depth", "objects", "values"),
    [
        (b'["[[[,", {"a,\\"[": [1, 2, {}]}, "\\\\", []]', 4, 5, 10),
        (b'[[], [[]], {"\xc3\xa9": "}\\\\\\"{", "b": 0}]', 3, 5, 8),
    ],
)
def test_structure_is_counted_as_json_has_it(body, depth, objects, values, monkeypatch):
    """Each limit is met exactly, whatever strings hold."""
    json.loads(body)
    limits = {"MOST_DEPTH": depth, "MOST_OBJECTS": objects, "MOST_VALUES": values}
    for name, exact in limits.items():
        for limit in limits:
            monkeypatch.setattr(bodies, limit, 10**9)
        monkeypatch.setattr(bodies, name, exact)
        require_simple(body)
        monkeypatch.setattr(bodies, name, exact - 1)
        with pytest.raises(InvalidBody, match=f"more than {exact - 1} "):
            require_simple(body)


@pytest.mark.parametrize("value", [b"[" * 500 + b"]" * 500, b"[0" + 2_200_000 * b",0" + b"]"])
def test_structures_beyond_the_limits_are_refused_unparsed(value, server, monkeypatch):
    monkeypatch.setattr(bodies, "json", None)  # parsing would be an error 500
    for path, body in ROUTES[:-1]:
        complaint = error_of(server.post(path, body[:-1] + b', "unknown": ' + value + b"}"))
        assert "more than" in complaint


def test_as_many_levels_as_are_allowed_are_no_failure(serve):
    """Rendered by a template that writes tools, too."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}"
    tools = [{"function": json.loads('[{"a":' * 60 + "1" + "}]" * 60)}]
    with serve() as server:
        server.model.template = ChatTemplate(template, "test")
        answer = server.post(CHAT, json.loads(ASK_CHAT[1]) | {"tools": tools, "max_tokens": 2})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("error", [RecursionError("deep"), KeyError("secret"), MemoryError()])
def test_an_unexpected_error_is_an_error_object(error, server, monkeypatch, capsys):
    monkeypatch.setattr(endpoints, "messages_of", Mock(side_effect=error))
    answer = server.post(*ASK_CHAT)
    assert error_of(answer, 500) == "the server failed; its log says why"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    log = capsys.readouterr().err
    assert type(error).__name__ in log and "secret" not in log and "Traceback" not in log


def rest_of(connection):
    """Waits for the end of a connection."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1000):
            answer += part
    return answer


def drip(connection, byte):
    """Sends a byte now and then until there is an answer, or the end."""
    connection.settimeout(0.02)
    with contextlib.suppress(ConnectionError):
        for _ in range(3000):
            connection.sendall(byte)
            with contextlib.suppress(TimeoutError):
                return connection.recv(1000)
        pytest.fail("it is still open")
    return b""


@pytest.fixture
def hasty(serve):
    with serve(connections=Connections(header_seconds=QUICK)) as server:
        yield server


def test_what_comes_slowly_or_not_at_all(hasty, monkeypatch):
    """Headers and a body must come in time as a whole; a body may take longer than headers."""
    for sent in (b"", HEALTH[:-2], HEALTH + b"GET /hea"):
        with hasty.connect(sent) as connection:
            assert rest_of(connection).count(b" 200 OK") == sent.count(HEALTH)
    with hasty.connect(HEALTH[:-2] + b"X: ") as connection:
        assert drip(connection, b"x") == b""
    with hasty.connect(HEAD + b"Content-Length: 16\r\n\r\n") as connection:
        time.sleep(2 * QUICK)
        connection.sendall(b'{"content": "x"}')
        assert b"200 OK" in connection.recv(1000)
    monkeypatch.setattr(guards, "_BODY_SECONDS", QUICK)
    with hasty.connect(HEAD + b"Content-Length: 100000\r\n\r\n") as connection:
        answer = drip(connection, b" ")
        assert b" 408 " in answer and b"application/json" in answer
        connection.settimeout(60)
        rest_of(connection)


@pytest.mark.parametrize("per_address", [0, 300])
def test_silent_connections_make_room(per_address, serve):
    limits = Connections(300, per_address, header_seconds=600)
    with serve(connections=limits) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connect()) for _ in range(300)]
        until(lambda: len(limits.open) == 300)
        assert [server.get("/health").status_code for _ in range(3)] == [200] * 3
        assert rest_of(silent[0]) == b"" and len(limits.open) <= 300


@pytest.mark.parametrize("limits", [Connections(3, 0), Connections(100, 3)])
def test_connections_that_ask_for_something_stay(limits, serve):
    with serve(connections=limits) as server, contextlib.ExitStack() as stack:
        asked = HEAD + b"Content-Length: 16\r\n\r\n"
        busy = [stack.enter_context(server.connect(asked)) for _ in range(3)]
        until(lambda: [c.is_silent for c in limits.open] == [False] * 3)
        with server.connect() as fourth:
            answer = fourth.recv(1000)
            assert answer.startswith(b"HTTP/1.1 503 ") and b'"error"' in answer
        assert limits.make_space("another address") == (limits.most > 3)
        for each in busy:
            each.sendall(b'{"content": "x"}')
            assert b"200 OK" in each.recv(1000)
        assert server.get("/health").status_code == 200, "they are silent now"
    assert not limits.open


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 16\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 16\r\nContent-Length: 17\r\n",
        b"Transfer-Encoding : chunked\r\nContent-Length: 16\r\n",
    ],
)
def test_a_request_with_two_lengths_is_refused_and_closed(framing, server):
    """A proxy might see another request in what follows (request smuggling)."""
    second = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect(HEAD + framing + b"\r\n0\r\n\r\n" + second) as connection:
        answer = rest_of(connection)
        assert answer.count(b"HTTP/1.1 ") == 1 and b"rgexport_" not in answer
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
