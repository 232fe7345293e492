"""The chat page where hosts, networks, storage or the model fail, and where others mean harm."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rgexport.export.opening import open_artifact
from rgexport.page import site
from tests.page.chat_page import Browser, Profile, opened
from tests.page.site_server import Broken, SiteServer, serving

pytestmark = pytest.mark.full


def test_a_broken_download_goes_on(profile: Profile, wasm_site: site.Site) -> None:
    """What came is kept, over a reload too; nothing that came is asked for again."""
    chunks = sorted(address for address in wasm_site if address.startswith("chunks/"))
    broken, came = set(chunks[4:]), set()

    def fault(address: str, body: bytes) -> bytes:
        if address in broken:
            return body[: len(body) // 2] if address == chunks[5] else _break()
        came.add(address)
        return body

    with serving(wasm_site, fault) as server:
        tab = profile.open(server.url)
        assert "What is here is kept; try again" in tab.wait_for_error()
        assert tab.page.inner_text("#load") == "Try again"
        missing = sorted(set(chunks) - came)
        assert len(missing) >= len(broken)
        broken.clear()
        server.asked.clear()
        tab.page.reload()
        tab.wait_until_open()
        assert sorted(server.chunks) == missing
        server.asked.clear()
        tab.page.reload()
        tab.wait_until_open()
        assert server.chunks == []


def _break() -> bytes:
    raise Broken


@pytest.mark.parametrize("lasting", [False, True])
def test_a_damaged_chunk(profile: Profile, wasm_site: site.Site, lasting: bool) -> None:
    """It is asked for again; if it stays damaged the page says so, and does not use it."""
    chosen = max(address for address in wasm_site if address.startswith("chunks/"))
    answers = []

    def fault(address: str, body: bytes) -> bytes:
        if address == chosen and (lasting or not answers):
            answers.append(address)
            return body[:-1] + bytes([body[-1] ^ 1])
        return body

    with serving(wasm_site, fault) as server:
        tab = profile.open(server.url)
        if lasting:
            assert "came damaged" in tab.wait_for_error()
            assert not tab.page.is_visible("#talk")
        else:
            tab.wait_until_open()
        assert server.chunks.count(chosen) == (4 if lasting else 2)


def test_a_chunk_that_was_damaged_in_the_storage(profile: Profile, server: SiteServer) -> None:
    tab = opened(profile, server)
    tab.page.evaluate(
        """async () => {
            const cache = await caches.open("rgexport-weights /");
            const [request] = await cache.keys();
            await cache.put(request, new Response("nonsense"));
        }"""
    )
    server.asked.clear()
    tab.page.reload()
    tab.wait_until_open()
    assert len(server.chunks) == 1


def test_a_host_that_sends_no_headers(profile: Profile, wasm_site: site.Site) -> None:
    """The service worker adds those that threads need."""
    with serving(wasm_site, plain=True) as server:
        tab = opened(profile, server)
        assert tab.page.evaluate("crossOriginIsolated")
        assert tab.say("Hi there") and tab.said == []


@pytest.mark.parametrize("missing", ["manifest.webmanifest", "assets/index"])
def test_a_host_that_lacks_a_file(profile: Profile, wasm_site: site.Site, missing: str) -> None:
    """An icon or the manifest do not matter; without a script the page works online."""

    def fault(address: str, body: bytes) -> bytes:
        # The first time the page itself asks, then its service worker.
        if address.startswith(missing) and server.asked.count(address) > 1:
            raise Broken
        return body

    with serving(wasm_site, fault) as server:
        tab = opened(profile, server)
        assert tab.say("Hi there")


def test_a_new_version_of_the_site(profile: Profile, wasm_site: site.Site) -> None:
    """Only chunks that are new are loaded, and old ones are deleted."""
    with serving(wasm_site) as server:
        opened(profile, server)
        catalog = json.loads(site.read(wasm_site[site.CATALOG]))
        (model,) = catalog["models"]
        config = next(file for file in model["files"] if file["path"] == "generation_config.json")
        part = site.read(server.site[f"chunks/{config['chunks'][0]}.bin"]) + b" "
        name = hashlib.sha256(part).hexdigest()
        old, config["chunks"] = config["chunks"], [name]
        config["bytes"] += 1
        model["bytes"] += 1
        server.site[site.CATALOG] = json.dumps(catalog).encode()
        server.site[f"chunks/{name}.bin"] = part
        server.asked.clear()
        tab = profile.open(server.url)
        tab.wait_until_open()
        assert server.chunks == [f"chunks/{name}.bin"]
        stored = tab.page.evaluate(
            'async () => (await (await caches.open("rgexport-weights /")).keys()).map((r) => r.url)'
        )
        assert any(name in url for url in stored) and not any(old[0] in url for url in stored)


def test_an_update_of_the_page_works_offline(profile: Profile, wasm_site: site.Site) -> None:
    """What two versions share, such as ONNX Runtime, is not lost with the older one."""
    with serving(wasm_site) as server:
        opened(profile, server).page.close()
        worker = site.read(wasm_site["sw.js"]).replace(b'version\\":\\"', b'version\\":\\"new-')
        assert worker != site.read(wasm_site["sw.js"])
        server.site["sw.js"] = worker
        tab = opened(profile, server)
        # The old worker serves this visit; the new one comes in the background.
        tab.page.wait_for_timeout(3000)
        assert server.asked.count("sw.js") >= 2 and server.asked.count("index.html") >= 2
    tab.page.reload()
    tab.wait_until_open()
    assert tab.say("Hi there")


def test_nothing_goes_to_other_hosts(profile: Profile, server: SiteServer) -> None:
    """Not from the page, and not from the model's thread, which the page's policy does not bind."""
    tab = opened(profile, server)
    with serving({"x": b"x"}) as other:
        ask = f"async () => fetch('{other.url}x').then(() => 'ok', () => 'refused')"
        assert tab.page.evaluate(ask) == "refused"
        (thread,) = (worker for worker in tab.page.workers if "assets/worker" in worker.url)
        assert thread.evaluate(ask) == "refused"
        assert other.asked == []


def test_a_failed_answer_loses_no_message(profile: Profile, server: SiteServer) -> None:
    tab = opened(profile, server)
    tab.say("Hi there")
    tab.page.evaluate(
        """async () => {
            const { id } = await new Promise((done) => {
                const asked = indexedDB.open("rgexport-conversations /");
                asked.onsuccess = () => {
                    const store = asked.result.transaction("conversations");
                    const all = store.objectStore("conversations").getAll();
                    all.onsuccess = () => (asked.result.close(), done(all.result[0]));
                };
            });
            await new Promise((held) => navigator.locks.request(`rgexport-${id} /`, () => {
                held();
                return new Promise((done) => (window.release = done));
            }));
        }"""
    )
    before = tab.messages
    for button in ("#again", "#delete"):
        tab.page.once("dialog", lambda dialog: dialog.accept())
        tab.page.click(button)
        assert "answered in another tab" in tab.wait_for_error()
        assert tab.messages == before
        tab.page.evaluate("document.getElementById('error').textContent = ''")
    tab.page.fill("#text", "What did I say?")
    tab.page.press("#text", "Enter")
    assert "answered in another tab" in tab.wait_for_error()
    assert tab.messages == before and tab.page.input_value("#text") == "What did I say?"
    tab.page.evaluate("window.release()")
    tab.page.press("#text", "Enter")
    tab.page.locator("article").nth(3).wait_for()


def test_an_engine_that_fails_loses_no_message(profile: Profile, server: SiteServer) -> None:
    tab = opened(profile, server)
    first = tab.say("Hi there")
    (thread,) = (worker for worker in tab.page.workers if "assets/worker" in worker.url)
    fail = "crypto.subtle.digest = () => Promise.reject(new Error('out of order'))"
    thread.evaluate(f"() => {{ {fail}; }}")
    tab.page.fill("#text", "What did I say?")
    tab.page.press("#text", "Enter")
    assert "out of order" in tab.wait_for_error()
    tab.page.wait_for_selector("#send:visible")
    assert tab.messages == ["Hi there", first]
    assert tab.page.input_value("#text") == "What did I say?"
    thread.evaluate("() => { delete crypto.subtle.digest; }")
    assert tab.page.evaluate("document.activeElement.id") == "text"
    tab.page.press("#text", "Enter")
    tab.page.locator("article").nth(3).wait_for()


def test_two_sites_on_one_host(profile: Profile, wasm_site: site.Site) -> None:
    """Each has its own model, page and conversations, and leaves the rest of the host alone."""
    rest = {"blog/index.html": b"<p>A blog</p>", "assets/logo.css": b"p { color: red }"}
    sites = [{f"{folder}{name}": part for name, part in wasm_site.items()} for folder in ("", "b/")]
    with serving({**sites[0], **sites[1], **rest}) as server:
        tab = opened(profile, server)
        tab.say("Hi there")
        other = opened(profile, server, "b/index.html")
        assert other.messages == []
        assert {name.partition("chunks/")[0] for name in server.asked if "chunks/" in name} == {
            *("", "b/")
        }
        blog = profile.open(f"{server.url}blog/index.html")
        assert not blog.page.evaluate("crossOriginIsolated")
        for each in (tab, other):
            each.page.reload()
            each.wait_until_open()
        assert len(tab.messages) == 2 and other.messages == []


def test_a_deleted_model_is_not_loaded_again_at_once(
    profile: Profile, wasm_site: site.Site
) -> None:
    with serving(wasm_site) as server:
        tab = opened(profile, server)
        tab.page.click("summary")
        tab.page.once("dialog", lambda dialog: dialog.accept())
        server.asked.clear()
        tab.page.click("#remove")
        tab.page.wait_for_selector("#load:visible")
        assert server.chunks == []
        tab.page.click("#load")
        tab.wait_until_open()
        assert server.chunks


def test_a_thread_that_does_not_start(profile: Profile, wasm_site: site.Site) -> None:
    broken = {name: b"}" if "assets/worker" in name else part for name, part in wasm_site.items()}
    with serving(broken) as server:
        tab = profile.open(server.url)
        assert "The model's thread ended" in tab.wait_for_error()
        assert tab.page.inner_text("#load") == "Try again"


def test_a_server_in_trouble_is_as_good_as_none(profile: Profile, wasm_site: site.Site) -> None:
    """The list of models that came last is used."""
    with serving(wasm_site) as server:
        tab = opened(profile, server)
        del server.site[site.CATALOG]
        tab.page.reload()
        tab.wait_until_open()


def test_a_site_that_lacks_its_catalog_for_a_while(profile: Profile, wasm_site: site.Site) -> None:
    with serving(wasm_site) as server:
        catalog = server.site.pop(site.CATALOG)
        tab = profile.open(server.url)
        assert "model.json, cannot be read (404)" in tab.wait_for_error()
        assert tab.page.inner_text("#load") == "Try again"
        tab.page.click("#load")
        tab.page.wait_for_selector("#load:visible")
        assert "model.json" in tab.wait_for_error()
        assert tab.page.evaluate("document.activeElement.id") == "load"
        server.site[site.CATALOG] = b"{"
        tab.page.click("#load")
        tab.page.wait_for_selector("#error:has-text('is damaged')")
        server.site[site.CATALOG] = catalog
        tab.page.click("#load")
        tab.wait_until_open()
        assert tab.error == ""


def test_a_browser_without_scripts(browser: Browser, server: SiteServer) -> None:
    with browser.profile(java_script_enabled=False) as profile:
        page = profile.open(server.url).page
        assert "needs JavaScript" in page.inner_text("main")
        assert "Starting" not in page.inner_text("main") and not page.is_visible("#new")


def test_html_in_a_message_is_text(profile: Profile, server: SiteServer, tmp_path: Path) -> None:
    """What a model writes, or a file of somebody else holds, runs nothing."""
    tab = opened(profile, server)
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


def test_a_site_for_graphics_cards_alone(
    profile: Profile, built_page: None, artifact: Callable[[str], Path]
) -> None:
    found = site.make_site([open_artifact(artifact("webgpu"))])
    with serving(found) as server:
        tab = profile.open(f"{server.url}?device=wasm")
        assert "needs WebGPU" in tab.wait_for_error()
        assert server.chunks == []
