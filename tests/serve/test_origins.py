"""Requests that a web page of another origin makes a browser send."""

from typing import Any

import httpx
import pytest

from rgexport.serve.app import Settings
from tests.serve.conftest import Serve, Served

JSON = {"Content-Type": "application/json"}
COMPLETE = "/v1/completions", b'{"prompt": "hello", "max_tokens": 2}'
ROUTES = [
    COMPLETE,
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "hello"}]}'),
    ("/tokenize", b'{"content": "hello"}'),
    ("/detokenize", b'{"tokens": [5]}'),
    ("/apply-template", b'{"messages": [{"role": "user", "content": "hello"}]}'),
    ("/slots/0?action=erase", b""),
]
PAGE = "https://a.example"


def ask(server: Served, route: tuple[str, bytes], **headers: str) -> httpx.Response:
    path, body = route
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = (JSON if body else {}) | named
    return httpx.post(server.url + path, content=body, headers=sent, timeout=30)


def counts(server: Served) -> Any:
    return server.model.scheduler.counters.requests


@pytest.mark.parametrize("host", ["evil.test", "evil.test:8080", "127.0.0.1.evil.test", "", "a b"])
def test_a_foreign_host_is_refused(host: str, server: Served) -> None:
    before = counts(server)
    origin = f"http://{host}"
    for headers in ({"Host": host}, {"Host": host, "Origin": origin}):
        answer = ask(server, COMPLETE, **headers)
        assert answer.status_code == 403 and "Host" in answer.json()["error"]["message"]
    for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/none"):
        assert httpx.get(server.url + path, headers={"Host": host}).status_code == 403
    assert counts(server) == before


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:8080"])
def test_this_machine_has_these_names(host: str, server: Served) -> None:
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


def test_a_name_may_be_allowed(serve: Serve) -> None:
    with serve(Settings(log=False, allowed_hosts=("chat.example",))) as server:
        own = {"Host": "chat.example", "Origin": "https://chat.example"}
        assert ask(server, COMPLETE, **own).status_code == 200
        assert ask(server, COMPLETE, Host="evil.test").status_code == 403


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route[0])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": PAGE},
        {"Origin": "null"},
        {"Origin": "http://[::1"},
        {"Origin": "http://localhost:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"},
    ],
    ids=lambda headers: " ".join(headers.values()),
)
def test_pages_of_other_origins_run_nothing(
    headers: dict[str, str], route: tuple[str, bytes], server: Served
) -> None:
    before = counts(server)
    answer = ask(server, route, **headers)
    assert answer.status_code == 403 and "--cors-origin" in answer.json()["error"]["message"]
    assert counts(server) == before


def test_the_last_conversation_stays_when_another_page_erases_it(server: Served) -> None:
    assert ask(server, COMPLETE).status_code == 200
    assert ask(server, ("/slots/0?action=erase", b""), Origin=PAGE).status_code == 403
    erased = ask(server, ("/slots/0?action=erase", b""))
    assert erased.status_code == 200 and erased.json()["n_erased"] > 0


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route[0])
def test_the_servers_own_origin_may(route: tuple[str, bytes], server: Served) -> None:
    assert ask(server, route, Origin=server.url, Sec_Fetch_Site="same-origin").status_code == 200


def test_images_of_other_pages_are_refused_and_links_are_not(server: Served) -> None:
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert httpx.get(f"{server.url}/metrics", headers=image).status_code == 403
    link = image | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert httpx.get(f"{server.url}/openapi.json", headers=link).status_code == 200


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "text/json", "multipart/json"]
)
@pytest.mark.parametrize("route", ROUTES[:5], ids=lambda route: route[0])
def test_a_body_must_be_json(kind: str | None, route: tuple[str, bytes], server: Served) -> None:
    before, (path, body) = counts(server), route
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(server.url + path, content=body, headers=headers)
    assert answer.status_code == 400 and "Content-Type" in answer.json()["error"]["message"]
    assert counts(server) == before


def test_an_allowed_page_may_and_reads_errors_too(serve: Serve) -> None:
    settings = Settings(log=False, cors_origins=(PAGE,), api_key="sesame", body_bytes=1000)
    with serve(settings) as server:
        key = {"Authorization": "Bearer sesame"}
        large = "/tokenize", b'{"content": "' + b"x" * 2000 + b'"}'
        found = {
            200: ask(server, COMPLETE, Origin=PAGE, Sec_Fetch_Site="cross-site", **key),
            400: ask(server, ("/tokenize", b"{"), Origin=PAGE, **key),
            401: ask(server, COMPLETE, Origin=PAGE),
            404: ask(server, ("/none", b"{}"), Origin=PAGE, **key),
            413: ask(server, large, Origin=PAGE, **key),
        }
        for status, answer in found.items():
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
        preflight = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        answer = httpx.options(server.url + COMPLETE[0], headers=preflight)
        assert answer.status_code == 200
        refused = ask(server, COMPLETE, Origin="https://b.example", **key)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
