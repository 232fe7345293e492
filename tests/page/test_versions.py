"""Two builds of the chat page on one host, one after the other, in several tabs."""

import re

import pytest

from rgexport.page import site
from tests.page.chat_page import Profile, opened
from tests.page.site_server import serving

pytestmark = pytest.mark.slow

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


CACHES = "async () => (await caches.keys()).filter((name) => name.includes('-page '))"


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
        new.page.wait_for_function(
            "async () => (await caches.keys()).some((name) => name.includes(' new-'))"
        )
        new.page.wait_for_function(
            "async () => (await navigator.serviceWorker.getRegistration()).active && "
            "!(await navigator.serviceWorker.getRegistration()).installing"
        )
        new.page.reload()
        new.wait_until_open()
        assert "NewBuild" in new.page.content() and "NewBuild" not in old.page.content()
        old.page.click("#load")
        old.wait_until_open()
        assert old.say("Hi there")
        assert first in new.page.evaluate(CACHES)
        old.page.close()
        new.page.reload()
        new.wait_until_open()
        new.page.wait_for_function(
            "async (first) => !(await caches.keys()).includes(first)", arg=first
        )
        assert len(new.page.evaluate(CACHES)) == 1
    new.page.reload()  # nothing answers now
    new.wait_until_open()
    assert new.messages
