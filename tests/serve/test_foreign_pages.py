"""A page of another origin in Chromium: it runs nothing here, and reads nothing."""

import re
from pathlib import Path

import pytest

from rgexport.serve.server import ServerSettings
from tests.npm.browser import launched
from tests.serve.conftest import COMPLETE

pytestmark = pytest.mark.full
EVIL = "evil.test"  # A name that leads to this machine, in the browser alone
ATTACKS = Path(__file__).with_name("attacks.js").read_text()


@pytest.fixture(scope="module")
def browser():
    # Or else Chromium itself stops some attacks. Other browsers do not.
    features = "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests"
    with launched(f"--host-resolver-rules=MAP {EVIL} 127.0.0.1", features) as started:
        yield started


def attacked(browser, server, origin):
    """What a page of this origin reads from the server, the requests that ran, and the slots."""
    assert server.post(COMPLETE, {"prompt": "hello", "max_tokens": 2}).status_code == 200
    counters = server.model.scheduler.counters
    before = counters.requests
    with browser.new_page() as page:
        page.set_default_timeout(120_000)
        blank = {"body": "<body></body>", "content_type": "text/html"}
        page.route(f"{origin}/attack", lambda route: route.fulfill(**blank))
        page.goto(f"{origin}/attack")
        read = page.evaluate(ATTACKS, server.url)
        page.wait_for_timeout(500)  # beacons come when they like
    return read, counters.requests - before, server.get("/slots").json()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", EVIL])
def test_a_page_of_another_origin(name, browser, serve):
    with serve() as server:
        read, count, slots = attacked(browser, server, f"http://{name}:8765")
        assert not any(read.values()) and count == 0 and slots, read
        refused = re.findall(r'answers_total\{.*status="403"\} (\d+)', server.get("/metrics").text)
        assert sum(map(int, refused)) >= 10, "they came here, and were refused"


def test_a_page_that_is_allowed(browser, serve):
    """The attacks are requests that the server would answer."""
    origin = "http://127.0.0.1:8765"
    with serve(ServerSettings(log=False, cors_origins=(origin,))) as server:
        read, count, slots = attacked(browser, server, origin)
        assert "text_completion" in read["fetch"] and "toy" in read["get"]
        assert count == 1 and slots == []
