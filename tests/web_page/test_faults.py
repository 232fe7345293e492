"""The chat page where hosts, networks or the model fail, and where others mean harm."""

import contextlib
import json
import re
import time

import pytest
from playwright.sync_api import TimeoutError

from rgexport.web_page import site
from tests.web_page.chat_page import PATIENCE
from tests.web_page.site_server import Broken, serving

pytestmark = pytest.mark.full

DAMAGE_STORED = """async () => {
    const cache = await caches.open("rgexport-weights /");
    const [request] = await cache.keys();
    await cache.put(request, new Response("nonsense"));
}"""
IS_UPDATED = """async () => {
    const { active, waiting, installing } = await navigator.serviceWorker.getRegistration();
    const stored = await Promise.all(
        (await caches.keys()).map(async (name) => (await caches.open(name)).keys())
    );
    const isNew = stored.flat().some(({ url }) => url.includes("NewBuild"));
    return isNew && !installing && !waiting && active.state === "activated";
}"""
CACHES = "async () => (await caches.keys()).filter((name) => name.includes('-page '))"
ASSET = re.compile(r"^assets/([\w.-]+?)-[\w-]{8}\.(js|css)$")


def test_a_broken_download_goes_on(profile, wasm_site):
    """What came is kept, over a reload too; nothing that came is asked for again."""
    chunks = sorted(address for address in wasm_site if address.startswith("chunks/"))
    broken, came = set(chunks[4:]), set()

    def fault(address, body):
        if address == chunks[5] and broken:
            return body[: len(body) // 2]
        if address in broken:
            raise Broken
        came.add(address)
        return body

    with serving(wasm_site, fault) as server:
        tab = profile.open(server.url)
        assert "What is here is kept; try again" in tab.wait_for_error()
        missing = sorted(set(chunks) - came)
        assert len(missing) >= len(broken) and tab.text("load") == "Try again"
        broken.clear()
        for expected in (missing, []):
            server.asked.clear()
            tab.reload()
            assert sorted(server.chunks) == expected


@pytest.mark.parametrize("is_lasting", [False, True])
def test_a_damaged_chunk(profile, wasm_site, is_lasting):
    """It is asked for again; if it stays damaged the page says so, and does not use it."""
    chosen = max(address for address in wasm_site if address.startswith("chunks/"))
    answers = []

    def fault(address, body):
        if address == chosen and (is_lasting or not answers):
            answers.append(address)
            return body[:-1] + bytes([body[-1] ^ 1])
        return body

    with serving(wasm_site, fault) as server:
        tab = profile.open(server.url)
        if is_lasting:
            assert "came damaged" in tab.wait_for_error()
            assert not tab.page.is_visible("#talk") and server.chunks.count(chosen) == 4
            return
        tab.wait_until_open()
        assert server.chunks.count(chosen) == 2
        tab.page.evaluate(DAMAGE_STORED)
        server.asked.clear()
        tab.reload()
        assert len(server.chunks) == 1


def rebuilt(files):
    """The site as another build has it: scripts and styles have other names."""
    names = {name: ASSET.sub(r"assets/\1-NewBuild.\2", name) for name in files}
    short = {old[7:]: new[7:] for old, new in names.items() if old != new}
    assert len(short) >= 3
    made = {}
    for name, part in files.items():
        body = site.read_content(part)
        if name.endswith((".js", ".css", ".html")):
            text = body.decode()
            for old, new in short.items():
                text = text.replace(old, new)
            body = text.replace('version\\":\\"', 'version\\":\\"new-').encode()
        made[names[name]] = body
    return made


def test_a_new_version_of_the_page(profile, wasm_site):
    """An old tab goes on to work; what the versions share is not lost with the older one."""
    with serving(wasm_site) as server:
        old = profile.talk(server)
        old.page.evaluate("sessionStorage.setItem('rgexport-deleted /', 'yes')")
        old.page.evaluate("caches.delete('rgexport-weights /')")
        old.page.reload()
        old.page.wait_for_selector("#load:visible")  # its thread has not been started
        (first,) = old.page.evaluate(CACHES)
        files = rebuilt(wasm_site)
        server.site.clear()
        server.site.update(files)
        new = profile.open(server.url)
        end = time.monotonic() + PATIENCE / 1000
        while not new.page.evaluate(IS_UPDATED):
            assert time.monotonic() < end
            new.page.wait_for_timeout(5000)
            # The check that a visit begins is lost where an earlier one goes on. While a version
            # takes over, Chromium seldom does not end a visit; as a user would, begin another.
            with contextlib.suppress(TimeoutError):
                new.page.reload(timeout=60_000)
                new.wait_until_open()
        new.reload()
        assert "NewBuild" in new.page.content() and "NewBuild" not in old.page.content()
        old.page.click("#load")
        old.wait_until_open()
        assert old.say("Hi there")
        assert first in new.page.evaluate(CACHES)
        old.page.close()
        for _ in range(10):  # the browser counts a closed tab for a while; each start tries again
            new.reload()
            new.page.wait_for_timeout(1000)
            if first not in new.page.evaluate(CACHES):
                break
        assert len(new.page.evaluate(CACHES)) == 1
    new.reload()  # nothing answers now
    assert new.messages and new.say("Hi there")


def test_nothing_goes_to_other_hosts(tab):
    """Not from the page, and not from the model's thread, which the page's policy does not bind."""
    with serving({"x": b"x"}) as other:
        ask = f"async () => fetch('{other.url}x').then(() => 'ok', () => 'refused')"
        assert tab.page.evaluate(ask) == tab.thread.evaluate(ask) == "refused"
        assert other.asked == []


@pytest.mark.parametrize(
    ("thrown", "sentence"),
    [
        ("new DOMException('', 'UnknownError')", "cannot use its storage"),
        ("new Error('')", "does not say what (Error)"),
        ("undefined", "does not say what (unknown error)"),
        ("8405", "failed (code 8405), often for lack of memory"),
        ("new Error('out of order')", "out of order"),
    ],
)
def test_an_engine_that_fails_loses_no_message(tab, thrown, sentence):
    first = tab.say("Hi there")
    tab.thread.evaluate(f"() => {{ crypto.subtle.digest = () => Promise.reject({thrown}); }}")
    tab.ask("What did I say?")
    assert sentence in tab.wait_for_error()
    tab.page.wait_for_selector("#send:visible")
    assert tab.messages == ["Hi there", first]
    assert tab.page.input_value("#text") == "What did I say?" and tab.focused() == "text"
    tab.thread.evaluate("() => { delete crypto.subtle.digest; }")
    tab.page.press("#text", "Enter")
    tab.page.locator("article").nth(3).wait_for()


def test_two_sites_on_one_host(profile, wasm_site):
    """Each has its own model, page and conversations, and leaves the rest of the host alone."""
    rest = {"blog/index.html": b"<p>A blog</p>", "assets/logo.css": b"p { color: red }"}
    other_site = {f"b/{name}": part for name, part in wasm_site.items()}
    with serving({**wasm_site, **other_site, **rest}) as server:
        tab = profile.talk(server)
        tab.say("Hi there")
        other = profile.talk(server, "b/index.html")
        assert other.messages == []
        folders = {name.partition("chunks/")[0] for name in server.asked if "chunks/" in name}
        assert folders == {"", "b/"}
        blog = profile.open(f"{server.url}blog/index.html")
        assert not blog.page.evaluate("crossOriginIsolated")
        tab.reload()
        other.reload()
        assert len(tab.messages) == 2 and other.messages == []


def test_html_in_a_message_is_text(tab, tmp_path):
    """What a model writes, or a file of somebody else holds, runs nothing."""
    tab.say("Hi there")
    file = tab.save(tmp_path)
    bad = '<img src=x onerror="document.title=1"> [a](javascript:alert(1)) **bold**'
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["rgexport.state"])
    fields["messages"] = [{"role": role, "content": bad} for role in ("user", "assistant")]
    header["__metadata__"]["rgexport.state"] = json.dumps(fields)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    tab.load(file)
    tab.page.wait_for_selector("article.assistant strong:has-text('bold')")
    assert tab.page.locator("article img").count() == 0
    assert tab.page.locator("article a").get_attribute("href") in (None, "")
    assert "onerror" in tab.messages[0] and "onerror" in tab.messages[1]
    assert tab.said == []
