"""The chat page where the browser's storage is full: it works, says so, and loses nothing."""

from pathlib import Path

import pytest

from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.page import site
from tests.page.chat_page import ChatPage, Profile, limit_replies, opened
from tests.page.site_server import SiteServer, serving

NOT_STORED = "storage is full: the page works now, but not offline"

pytestmark = pytest.mark.full


def set_quota(tab: ChatPage, server: SiteServer, size: int | None) -> None:
    """Gives the site so many bytes of storage; None takes the limit away."""
    limit = {} if size is None else {"quotaSize": size}
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url.rstrip("/"), **limit})


def fail_to_store(tab: ChatPage, store: str) -> None:
    """Aborts whatever this tab writes into a store of its database; none has no name.

    Chromium looks at a quota only every 30 seconds where it has just written.
    """
    tab.page.evaluate(
        """(store) => {
            window.put ??= IDBObjectStore.prototype.put;
            IDBObjectStore.prototype.put = function (...values) {
                if (this.name === store) queueMicrotask(() => this.transaction.abort());
                return window.put.apply(this, values);
            };
        }""",
        store,
    )


def opened_with_quota(profile: Profile, server: SiteServer, size: int) -> ChatPage:
    tab = ChatPage(profile.context.new_page())
    set_quota(tab, server, size)
    tab.page.goto(server.url)
    return tab


def test_a_conversation_that_cannot_be_stored(profile: Profile, server: SiteServer) -> None:
    """It goes on in memory, and is stored as soon as there is room."""
    tab = opened(profile, server)
    set_quota(tab, server, 1)
    tab.say("Hi there")
    assert "A conversation is not saved. The browser's storage is full." in tab.unsaved
    tab.say("What did I say?")
    before = tab.messages
    assert len(before) == 4 and before[0] == "Hi there"
    tab.page.click("#new")
    tab.say("Another one.")
    assert "2 conversations are not saved." in tab.unsaved
    tab.page.locator("#list button").nth(1).click()
    tab.page.wait_for_function("document.querySelectorAll('article').length === 4")
    assert tab.messages == before
    tab.say("And now?")
    before = tab.messages
    assert len(before) == 6
    set_quota(tab, server, None)
    tab.page.wait_for_selector("#unsaved:empty", state="attached")
    tab.page.reload()
    tab.wait_until_open()
    assert tab.messages == before and tab.page.locator("#list button").count() == 2


def test_an_unsaved_conversation_is_not_closed_unasked(
    profile: Profile, server: SiteServer, tmp_path: Path
) -> None:
    """The browser asks before it closes the tab; the conversation can be taken along as a file."""
    tab = opened(profile, server)
    set_quota(tab, server, 1)
    first = tab.say("Hi there")
    with tab.page.expect_event("dialog") as asked:
        tab.page.close(run_before_unload=True)
    assert asked.value.type == "beforeunload"
    asked.value.dismiss()
    assert tab.messages == ["Hi there", first]
    file = tab.save(tmp_path)
    set_quota(tab, server, None)
    tab.page.wait_for_selector("#unsaved:empty", state="attached")
    tab.page.click("#new")
    tab.load(file)
    tab.page.wait_for_selector("article.assistant")
    assert tab.messages == ["Hi there", first]


def test_a_conversation_that_another_tab_changes_meanwhile(
    profile: Profile, server: SiteServer
) -> None:
    """Both are kept: what was not saved becomes a conversation of its own."""
    tab = opened(profile, server)
    tab.say("Hi there")
    other = opened(profile, server)
    fail_to_store(tab, "conversations")
    tab.say("Said here.")
    here = tab.messages
    assert "not saved" in tab.unsaved
    other.say("Said there.")
    tab.page.locator("#list button").nth(1).wait_for()
    assert tab.messages == here and "not saved" in tab.unsaved
    fail_to_store(tab, "")
    tab.page.wait_for_selector("#unsaved:empty", state="attached")
    other.page.locator("#list button").nth(1).wait_for()
    assert other.messages[2] == "Said there." and here[2] == "Said here."


def test_states_make_room_for_texts(profile: Profile, server: SiteServer) -> None:
    tab = opened(profile, server)
    tab.say("Hi there")
    fail_to_store(tab, "states")
    tab.page.click("#new")
    tab.say("Another one.")
    assert tab.unsaved == ""
    tab.page.reload()
    tab.wait_until_open()
    assert tab.page.locator("#list button").count() == 2
    tab.page.click("#export")
    assert "say something first" in tab.wait_for_error()


@pytest.mark.parametrize("quota", [1, 5_000_000])
def test_the_page_runs_without_storage(profile: Profile, wasm_site: site.Site, quota: int) -> None:
    """With room for nothing, or for all but ONNX Runtime and the model."""
    with serving(wasm_site, plain=True) as server:
        tab = opened_with_quota(profile, server, quota)
        tab.wait_until_open()
        assert NOT_STORED in tab.page.inner_text("#notice")
        assert tab.page.evaluate("crossOriginIsolated")  # the service worker does its part
        limit_replies(tab)
        assert tab.say("Hi there") and tab.error == ""
        set_quota(tab, server, None)
        tab.page.wait_for_selector("#unsaved:empty", state="attached")
        tab.page.reload()
        tab.wait_until_open()
        assert tab.page.inner_text("#notice") == ""
        server.asked.clear()
        tab.page.reload()
        tab.wait_until_open()
        assert server.chunks == []
    tab.page.reload()  # nothing answers now
    tab.wait_until_open()


def test_a_large_model_is_not_stored_where_the_user_wants_that(
    profile: Profile, built_page: None, tmp_path: Path
) -> None:
    options = OnnxOptions(profile="wasm", precision="fp32")
    folder = export_onnx(open_checkpoint(size="demo"), options, tmp_path / "large")
    with serving(site.make_site([open_artifact(folder)])) as server:
        tab = opened_with_quota(profile, server, 5_000_000)
        tab.page.click("#load")
        assert "Without storing it, the model is downloaded at each visit" in tab.wait_for_error()
        assert tab.page.inner_text("#load") == "Load without storing it"
        assert tab.page.evaluate("document.activeElement.id") == "load"
        server.asked.clear()
        tab.page.click("#load")
        tab.wait_until_open()
        assert NOT_STORED in tab.page.inner_text("#notice")
        assert len(server.chunks) == len(set(server.chunks))


@pytest.mark.parametrize(
    ("thrown", "sentence"),
    [
        ("new DOMException('', 'UnknownError')", "cannot use its storage"),
        ("new DOMException('', 'DataError')", "does not say what (DataError)"),
        ("new Error('')", "does not say what (Error)"),
        ("undefined", "does not say what (unknown error)"),
        ("8405", "failed (code 8405), often for lack of memory"),
        ("new Error('out of order')", "out of order"),
    ],
)
def test_every_error_has_a_text(
    profile: Profile, server: SiteServer, thrown: str, sentence: str
) -> None:
    tab = opened(profile, server)
    (thread,) = (worker for worker in tab.page.workers if "assets/worker" in worker.url)
    thread.evaluate(f"() => {{ crypto.subtle.digest = () => Promise.reject({thrown}); }}")
    tab.page.fill("#text", "Hi there")
    tab.page.press("#text", "Enter")
    assert sentence in tab.wait_for_error()
