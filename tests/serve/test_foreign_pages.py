"""A page of another origin in Chromium: it runs nothing here, and reads nothing."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rgexport.serve.app import Settings
from tests.serve.conftest import COMPLETE, Served, get, post
from tests.web.browser import FLAGS, chromium

pytestmark = pytest.mark.full
EVIL = "evil.test"
"""A name that leads to this machine, in the browser alone."""
ATTACKS = """async (url) => {
  const body = '{"prompt": "hello", "max_tokens": 2}';
  const path = url + "/v1/completions", erase = url + "/slots/0?action=erase";
  const post = (target, options) => fetch(target, {method: "POST", ...options});
  const json = {headers: {"Content-Type": "application/json"}, body};
  const plain = new Blob([body], {type: "text/plain"}), bare = new Blob([body]);
  const read = async (request) => {
    try { return await (await request).text(); } catch (error) { return ""; }
  };
  const loaded = (tag, address) => new Promise((resolve) => {
    const element = document.createElement(tag);
    element.onload = () => resolve(tag === "img" ? `${element.width} pixels` : "it ran");
    element.onerror = () => resolve("");
    element.src = address;
    document.body.append(element);
  });
  const form = (address) => new Promise((resolve) => {
    const frame = document.createElement("iframe");
    frame.name = "frame" + Math.random();
    document.body.append(frame);
    const form = document.createElement("form");
    Object.assign(form, {method: "POST", action: address, enctype: "text/plain"});
    form.target = frame.name;
    const input = document.createElement("input");
    input.name = '{"prompt": "hello", "max_tokens": 2, "user": "';
    input.value = '"}';
    form.append(input);
    document.body.append(form);
    frame.onload = () => {
      try { resolve(frame.contentDocument.body.innerText); } catch (error) { resolve(""); }
    };
    form.submit();
  });
  return {
    "fetch": await read(post(path, json)),
    "text": await read(post(path, {body: plain})),
    "no-cors": await read(post(path, {body: plain, mode: "no-cors"})),
    "no type": await read(post(path, {body: bare, mode: "no-cors"})),
    "erase": await read(post(erase, {mode: "no-cors"})),
    "get": await read(fetch(url + "/v1/models")),
    "health": await read(fetch(url + "/health")),
    "image": await loaded("img", url + "/metrics"),
    "script": await loaded("script", url + "/v1/models"),
    "form": await form(path),
    "form that erases": await form(erase),
    "beacon": navigator.sendBeacon(path, plain) && navigator.sendBeacon(erase) ? "" : "not sent",
  };
}"""


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<body></body>")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    if not program:
        pytest.skip("Chromium is not installed, such as Debian's chromium-headless-shell")
    flags = [flag for flag in FLAGS if flag != "--headless"]
    rules = (
        f"--host-resolver-rules=MAP {EVIL} 127.0.0.1",
        # Or else Chromium itself stops some attacks. Other browsers do not.
        "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests",
    )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=[*flags, *rules])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_page() as opened:
        opened.set_default_timeout(120_000)
        yield opened


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of another web server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield other.server_port
        other.shutdown()


def complete(server: Served) -> None:
    body = {"prompt": "hello", "max_tokens": 2}
    assert post(server, COMPLETE, body).status_code == 200


def answers(server: Served, status: int) -> int:
    text = get(server, "/metrics").text
    counts = re.findall(rf'http_answers_total\{{[^}}]*status="{status}"\}} ([\d.]+)', text)
    return int(sum(map(float, counts)))


def attacked(page: Page, server: Served, url: str) -> dict[str, Any]:
    """What the page reads, after it was checked that nothing ran."""
    complete(server)
    before = server.model.scheduler.counters.requests
    slots = get(server, "/slots").json()
    read: dict[str, Any] = page.evaluate(ATTACKS, url)
    page.wait_for_timeout(500)  # beacons come when they like
    assert server.model.scheduler.counters.requests == before
    assert get(server, "/slots").json() == slots and slots
    return read


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", EVIL])
def test_a_page_of_another_origin(name, page, site, serve):
    with serve() as server:
        page.goto(f"http://{name}:{site}/")
        read = attacked(page, server, server.url)
        assert not any(read.values()), read
        assert answers(server, 403) >= 10, "they came here, and were refused"


def test_a_page_whose_name_was_led_here(page, serve):
    """After DNS rebinding, the page is of the same origin as the server, for the browser."""
    with serve() as server:
        url = server.url.replace("127.0.0.1", EVIL)
        blank = {"body": "<body></body>", "content_type": "text/html"}
        page.route(f"{url}/attack", lambda route: route.fulfill(**blank))
        page.goto(f"{url}/attack")
        read = attacked(page, server, url)
        refusal = f"the Host '{EVIL}:{url.rpartition(':')[2]}' is not allowed here"
        told = {attack: text for attack, text in read.items() if text}
        assert {"fetch", "get", "form"} <= told.keys()
        assert all(refusal in text for text in told.values()), told


def test_a_page_that_is_allowed(page, site, serve):
    """The attacks are requests that the server would answer."""
    origin = f"http://127.0.0.1:{site}"
    with serve(Settings(log=False, cors_origins=(origin,))) as server:
        page.goto(origin)
        complete(server)
        before = server.model.scheduler.counters.requests
        read = page.evaluate(ATTACKS, server.url)
        assert "text_completion" in read["fetch"] and "toy" in read["get"]
        assert server.model.scheduler.counters.requests == before + 1
        assert get(server, "/slots").json() == []
