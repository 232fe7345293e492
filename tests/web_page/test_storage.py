"""The chat page where the browser's storage is full: it works, says so, and loses nothing."""

import pytest

from tests.web_page.chat_page import LONGEST, ChatPage
from tests.web_page.site_server import serving

NOT_STORED = "storage is full: the page works now, but not offline"
FAIL_TO_STORE = """(store) => {
    window.put ??= IDBObjectStore.prototype.put;
    IDBObjectStore.prototype.put = function (...values) {
        if (this.name === store) queueMicrotask(() => this.transaction.abort());
        return window.put.apply(this, values);
    };
}"""
"""Aborts whatever a tab writes into a store of its database; none has no name.

Chromium looks at a quota only every 30 seconds where it has just written.
"""

pytestmark = pytest.mark.full


def set_quota(tab, server, size=None):
    """Gives the site so many bytes of storage; None takes the limit away."""
    limit = {} if size is None else {"quotaSize": size}
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url.rstrip("/"), **limit})


def test_a_conversation_that_cannot_be_stored(tab, server, tmp_path):
    """It goes on in memory, can be saved as a file, and is stored as soon as there is room.

    The browser asks before it closes the tab.
    """
    set_quota(tab, server, 1)
    tab.say("Hi there")
    assert "A conversation is not saved. The browser's storage is full." in tab.text("unsaved")
    tab.say("What did I say?")
    before = tab.messages
    assert len(before) == 4 and before[0] == "Hi there"
    with tab.page.expect_event("dialog") as asked:
        tab.page.close(run_before_unload=True)
    assert asked.value.type == "beforeunload"
    asked.value.dismiss()
    file = tab.save(tmp_path)
    tab.page.click("#new")
    tab.say("Another one.")
    assert "2 conversations are not saved." in tab.text("unsaved")
    tab.page.locator("#list button").nth(1).click()
    tab.page.wait_for_function("document.querySelectorAll('article').length === 4")
    assert tab.messages == before
    tab.say("And now?")
    after = tab.messages
    set_quota(tab, server)
    tab.wait_until_saved()
    tab.reload()
    assert tab.messages == after and tab.page.locator("#list button").count() == 2
    tab.page.click("#new")
    tab.load(file)
    tab.page.wait_for_selector("article.assistant")
    assert tab.messages == before


def test_a_conversation_that_another_tab_changes_meanwhile(tab, profile, server):
    """Both are kept: what was not saved becomes a conversation of its own."""
    tab.say("Hi there")
    other = profile.talk(server)
    tab.page.evaluate(FAIL_TO_STORE, "conversations")
    tab.say("Said here.")
    here = tab.messages
    assert "not saved" in tab.text("unsaved")
    other.say("Said there.")
    tab.page.locator("#list button").nth(1).wait_for()
    assert tab.messages == here and "not saved" in tab.text("unsaved")
    tab.page.evaluate(FAIL_TO_STORE, "")
    tab.wait_until_saved()
    other.page.locator("#list button").nth(1).wait_for()
    assert other.messages[2] == "Said there." and here[2] == "Said here."


@pytest.mark.parametrize("quota", [1, 5_000_000])
def test_the_page_runs_without_storage(profile, wasm_site, quota):
    """With room for nothing, or for all but ONNX Runtime and the model."""
    with serving(wasm_site, is_plain=True) as server:
        tab = ChatPage(profile.context.new_page())
        set_quota(tab, server, quota)
        tab.page.goto(server.url)
        tab.wait_until_open()
        assert NOT_STORED in tab.text("notice")
        assert tab.page.evaluate("crossOriginIsolated")  # the service worker does its part
        tab.set("longest", LONGEST)
        assert tab.say("Hi there") and tab.text("error") == ""
        set_quota(tab, server)
        tab.wait_until_saved()
        tab.reload()
        assert tab.text("notice") == ""
        server.asked.clear()
        tab.reload()
        assert server.chunks == []
    tab.reload()  # nothing answers now
