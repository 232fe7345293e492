"""Two builds of the chat page on one host, one after the other, in several tabs."""

import re
import time

import pytest

from rgexport.page import site
from tests.page.chat_page import PATIENCE, SECONDS, ChatPage, Profile, opened
from tests.page.site_server import serving

pytestmark = pytest.mark.full

_ASSET = re.compile(r"assets/(?P<stem>[\w.-]+?)-(?P<hash>[\w-]{8})\.(?P<end>js|css)")


def rebuilt(files: site.Site) -> dict[str, site.Part | bytes]:
    """The site as another build has it: scripts and styles have other names."""
    names = {
        name.removeprefix("assets/"): f"{match['stem']}-NewBuild.{match['end']}"
        for name in files
        if (match := _ASSET.fullmatch(name))
    }
    assert len(names) >= 3
    made: dict[str, site.Part | bytes] = {}
    for name, part in files.items():
        body = part
        if name.endswith((".js", ".css", ".html")):
            text = site.read(part).decode()
            for old, new in names.items():
                text = text.replace(old, new)
            if name == "sw.js":
                text = text.replace('version\\":\\"', 'version\\":\\"new-')
            body = text.encode()
        folder, _, base = name.rpartition("/")
        made[f"{folder}/{names[base]}" if base in names else name] = body
    return made


IS_UPDATED = """async () => {
    const { active, waiting, installing } = await navigator.serviceWorker.getRegistration();
    const stored = await Promise.all(
        (await caches.keys()).map(async (name) => (await caches.open(name)).keys())
    );
    const isNew = stored.flat().some(({ url }) => url.includes("NewBuild"));
    return isNew && !installing && !waiting && active.state === "activated";
}"""
CACHES = "async () => (await caches.keys()).filter((name) => name.includes('-page '))"


def wait_until(tab: ChatPage, condition: str) -> None:
    """Waits for an asynchronous condition, which `wait_for_function` does not wait for."""
    end = time.monotonic() + PATIENCE / SECONDS
    while not tab.page.evaluate(condition):
        assert time.monotonic() < end, f"not in {PATIENCE / SECONDS} s: {condition}"
        tab.page.wait_for_timeout(100)


def test_an_old_tab_works_after_an_update(profile: Profile, wasm_site: site.Site) -> None:
    with serving(wasm_site) as server:
        old = opened(profile, server)
        old.page.evaluate("sessionStorage.setItem('rgexport-deleted /', 'yes')")
        old.page.evaluate("caches.delete('rgexport-weights /')")
        old.page.reload()
        old.page.wait_for_selector("#load:visible")  # its thread has not been started
        (first,) = old.page.evaluate(CACHES)
        server.site.clear()
        server.site.update(rebuilt(wasm_site))
        new = profile.open(server.url)
        wait_until(new, IS_UPDATED)
        new.page.reload()
        new.wait_until_open()
        assert "NewBuild" in new.page.content() and "NewBuild" not in old.page.content()
        old.page.click("#load")
        old.wait_until_open()
        assert old.say("Hi there")
        assert first in new.page.evaluate(CACHES)
        old.page.close()
        for _ in range(10):  # the browser counts a closed tab for a while; each start tries again
            new.page.reload()
            new.wait_until_open()
            new.page.wait_for_timeout(1000)
            if first not in new.page.evaluate(CACHES):
                break
        assert len(new.page.evaluate(CACHES)) == 1
    new.page.reload()  # nothing answers now
    new.wait_until_open()
    assert new.messages
