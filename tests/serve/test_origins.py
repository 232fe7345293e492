"""Requests that a web page of another origin makes a browser send."""

import httpx
import pytest

from rgexport.serve.app import Settings
from tests.serve.conftest import CHAT, COMPLETE, error_of, get, post

ASK = COMPLETE, b'{"prompt": "hello", "max_tokens": 2}'
ERASE = "/slots/0?action=erase", b""
ROUTES = [
    ASK,
    (CHAT, b'{"messages": [{"role": "user", "content": "hello"}]}'),
    ("/tokenize", b'{"content": "hello"}'),
    ("/detokenize", b'{"tokens": [5]}'),
    ("/apply-template", b'{"messages": [{"role": "user", "content": "hello"}]}'),
    ERASE,
]
PAGE = "https://a.example"
OTHER_PAGES = [
    {"Origin": PAGE},
    {"Origin": "null"},
    {"Origin": "http://[::1"},
    {"Origin": "http://localhost:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
]


@pytest.fixture
def unasked(server):
    """Checks that nothing was asked of the model."""
    before = server.model.scheduler.counters.requests
    yield
    assert server.model.scheduler.counters.requests == before


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("host", ["evil.test", "evil.test:8080", "127.0.0.1.evil.test", "", "a b"])
def test_a_foreign_host_is_refused(host, server):
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert "Host" in error_of(post(server, *ASK, **headers), 403)
    for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/none"):
        assert get(server, path, Host=host).status_code == 403


def test_names_that_are_allowed(serve, server):
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8080"):
        assert get(server, "/health", Host=host).status_code == 200
    with serve(Settings(log=False, allowed_hosts=("chat.example",))) as server:
        named = {"Host": "chat.example", "Origin": "https://chat.example"}
        assert post(server, *ASK, **named).status_code == 200
        assert post(server, *ASK, Host="evil.test").status_code == 403


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("headers", OTHER_PAGES, ids=lambda headers: " ".join(headers.values()))
def test_pages_of_other_origins_run_nothing(headers, server):
    for route in ROUTES:
        assert "--cors-origin" in error_of(post(server, *route, **headers), 403)


def test_the_servers_own_origin_may_and_another_page_erases_nothing(server):
    for route in ROUTES[:-1]:
        allowed = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
        assert post(server, *route, **allowed).status_code == 200
    assert post(server, *ERASE, Origin=PAGE).status_code == 403
    assert post(server, *ERASE, **allowed).json()["n_erased"] > 0


def test_images_of_other_pages_are_refused_and_links_are_not(server):
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert get(server, "/metrics", **image).status_code == 403
    link = image | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert get(server, "/openapi.json", **link).status_code == 200


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json", "multipart/json"]
)
def test_a_body_must_be_json(kind, server):
    headers = {} if kind is None else {"Content-Type": kind}
    for path, body in ROUTES[:5]:
        answer = httpx.post(server.url + path, content=body, headers=headers, timeout=60)
        assert "Content-Type application/json?" in error_of(answer)


def test_an_allowed_page_may_and_reads_errors_too(serve, server):
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in get(server, "/health", **preflight).headers
    settings = Settings(log=False, cors_origins=(PAGE,), api_key="sesame", body_bytes=1000)
    with serve(settings) as server:
        key = {"Authorization": "Bearer sesame"}
        large = b'{"content": "' + b"x" * 2000 + b'"}'
        answers = {
            200: post(server, *ASK, Origin=PAGE, **{"Sec-Fetch-Site": "cross-site"}, **key),
            400: post(server, "/tokenize", b"{", Origin=PAGE, **key),
            401: post(server, *ASK, Origin=PAGE),
            404: post(server, "/none", b"{}", Origin=PAGE, **key),
            413: post(server, "/tokenize", large, Origin=PAGE, **key),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
        other = {"Origin": "https://b.example"}
        for headers, status in ((preflight, 200), (preflight | other, 400)):
            answer = httpx.options(server.url + COMPLETE, headers=headers)
            assert answer.status_code == status
            assert ("access-control-allow-origin" in answer.headers) == (status == 200)
        refused = post(server, *ASK, **other, **key)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
