"""The chat page in headless Chromium, against rgexport's own replies."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import rgexport
from rgexport.chat.state_file import read_fields
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.page import site
from tests.page.chat_page import LONGEST, Browser, Profile, limit_replies, opened, plain
from tests.page.site_server import SiteServer, serving

MESSAGES = ["Hi there", "What did I say?", "Tell me a story.", "Thanks!"]
GREEDY = {"temperature": 0, "max_new_tokens": LONGEST}

pytestmark = pytest.mark.full


def test_a_conversation_and_its_state(
    profile: Profile, server: SiteServer, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    """The replies are rgexport's, each turn reads its own tokens alone, and the file goes on."""
    tab = opened(profile, server)
    assert tab.page.inner_text("#engine").startswith("WASM, ")
    messages: list = []
    with rgexport.load(artifact("wasm")) as model:
        for content in MESSAGES:
            said = tab.say(content)
            messages.append({"role": "user", "content": content})
            reply = model.chat(messages, **GREEDY)
            messages.append({"role": "assistant", "content": reply.text})
            assert plain(said) == plain(reply.text)
            new = reply.prompt_tokens - reply.cached_tokens + reply.new_tokens
            assert new - 1 <= tab.tokens_read <= new + 3
        file = tab.save(tmp_path)
        assert read_fields(file)["messages"] == messages
        saved = model.load_state(file)
        more = [*messages, {"role": "user", "content": "And now?"}]
        reply = model.chat(more, **GREEDY)
        assert reply.cached_tokens >= saved.position - 1
    assert plain(tab.say("And now?")) == plain(reply.text)
    assert "tokens/s" in tab.page.inner_text("#engine")
    assert tab.said == [] and tab.error == ""


def test_each_token_is_read_once(profile: Profile, server: SiteServer, tmp_path: Path) -> None:
    """Five sampled replies, in tokens that the tokenizer would not always choose."""
    tab = opened(profile, server)
    tab.page.click("summary")
    tab.page.fill("#temperature", "1.5")
    tab.page.click("summary")
    seen = 0
    for number in range(5):
        tab.say(f"Tell me story number {number}.")
        position = read_fields(tab.save(tmp_path))["position"]
        assert tab.tokens_read == position - seen
        seen = position


def test_a_state_of_ours_is_imported(
    profile: Profile, server: SiteServer, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "ours.state"
    said = [{"role": "user", "content": "Hello! " * 150}]  # beyond the window
    with rgexport.load(artifact("wasm")) as model:
        said.append({"role": "assistant", "content": model.chat(said, **GREEDY).text})
        saved = model.save_state(file, model.conversation_ids(said), said)
        more = [*said, {"role": "user", "content": "And now?"}]
        reply = model.chat(more, **GREEDY)
    tab = opened(profile, server)
    tab.load(file)
    tab.page.wait_for_selector("article.assistant")
    assert plain(tab.messages[0]) == plain(said[0]["content"])
    assert plain(tab.say("And now?")) == plain(reply.text)
    assert tab.tokens_read <= reply.prompt_tokens - saved.position + reply.new_tokens
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    tab.load(file)
    assert "damaged" in tab.wait_for_error()
    assert len(tab.messages) == 4
    file.write_bytes(b"no state")
    tab.load(file)
    tab.page.wait_for_selector("#error:has-text('no state file')")
    assert tab.said == []


def test_offline_after_the_first_load(profile: Profile, wasm_site: site.Site) -> None:
    with serving(wasm_site) as server:
        tab = opened(profile, server)
        first = tab.say("Hi there")
        count = len(server.asked)
    tab.page.reload()  # nothing answers now
    tab.wait_until_open()
    assert tab.messages == ["Hi there", first]
    before = tab.page.inner_text("#engine")
    assert "tokens/s" not in before
    assert tab.say("What did I say?")
    # The turn's own tokens: its four words and marks, and the reply.
    assert tab.tokens_read <= 16 + LONGEST
    assert len(server.asked) == count
    assert [line for line in tab.said if "ERR_CONNECTION_REFUSED" not in line] == []


def test_a_large_model_is_loaded_after_a_click(
    profile: Profile, built_page: None, tmp_path: Path
) -> None:
    options = OnnxOptions(profile="wasm", precision="fp32")
    folder = export_onnx(open_checkpoint(size="demo"), options, tmp_path / "large")
    with serving(site.make_site([open_artifact(folder)])) as server:
        tab = profile.open(server.url)
        tab.page.wait_for_selector("#load:visible")
        assert re.fullmatch(r"Load the model \(\d\d\.\d MB\)", tab.page.inner_text("#load"))
        assert server.chunks == []
        tab.page.click("#load")
        tab.wait_until_open()
        server.asked.clear()
        tab.page.reload()
        tab.wait_until_open()
        assert server.chunks == [] and tab.said == []


def test_several_tabs(profile: Profile, wasm_site: site.Site) -> None:
    """They download once, show each other's conversations, and do not write over them."""
    with serving(wasm_site) as server:
        tabs = [profile.open(server.url) for _ in range(4)]
        for tab in tabs:
            tab.wait_until_open()
            limit_replies(tab)
        assert len(server.chunks) == len(set(server.chunks))
    first, second, *_ = tabs
    said = first.say("Hi there")
    second.page.click("#list button")
    second.page.wait_for_selector("article.assistant")
    assert second.messages == ["Hi there", said]
    second.say("What did I say?")
    first.page.locator("article").nth(3).wait_for()
    assert first.messages == second.messages
    first.page.once("dialog", lambda dialog: dialog.accept())
    first.page.click("#delete")
    second.page.wait_for_selector("#list:empty", state="attached")
    assert second.messages == [] and first.messages == []
    assert [line for tab in tabs for line in tab.said if "REFUSED" not in line] == []


def test_by_the_keyboard(profile: Profile, server: SiteServer) -> None:
    """A long reply is stopped by Escape; Shift+Enter is a new line; Tab reaches every button."""
    tab = profile.open(server.url)
    tab.wait_until_open()
    page = tab.page
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("Tell me a story.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("A long one.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector("article.assistant p")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert tab.messages[0] == "Tell me a story.\nA long one."
    assert page.evaluate("document.activeElement.id") == "text"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"new", "import", "SUMMARY", "export", "again", "delete", "log", "text"} <= reached
    page.focus("#again")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert len(tab.messages) == 2 and tab.said == [] and tab.error == ""


def test_a_temperature(profile: Profile, server: SiteServer) -> None:
    """Replies differ, and the setting is kept."""
    tab = opened(profile, server)
    tab.page.click("summary")
    tab.page.fill("#temperature", "1.5")
    tab.page.click("summary")
    first = tab.say("Tell me a story.")
    for _ in range(3):
        tab.page.click("#again")
        tab.page.wait_for_selector("#stop:visible")
        tab.page.wait_for_selector("#send:visible")
    assert tab.messages[1] not in ("", first)
    tab.page.reload()
    tab.wait_until_open()
    assert tab.page.input_value("#temperature") == "1.5" and tab.error == ""


def test_webgpu(browser: Browser, built_page: None, artifact: Callable[[str], Path]) -> None:
    """In software; of two models the page takes that for the graphics card."""
    both = site.make_site([open_artifact(artifact(name)) for name in ("webgpu", "wasm")])
    with serving(both) as server, browser.profile() as profile:
        tab = opened(profile, server, "?device=webgpu")
        assert tab.page.inner_text("#engine") == "WebGPU"
        with rgexport.load(artifact("webgpu")) as model:
            reply = model.chat([{"role": "user", "content": "Hi there"}], **GREEDY)
        assert plain(tab.say("Hi there")) == plain(reply.text)
        assert tab.said == [] and tab.error == ""
        other = opened(profile, server, "?device=wasm")
        assert other.page.inner_text("#engine").startswith("WASM")


def test_a_second_enter_does_not_end_the_reply(profile: Profile, server: SiteServer) -> None:
    tab = opened(profile, server)
    first = tab.say("Tell me a story.")
    tab.page.click("#new")
    tab.page.fill("#text", "Tell me a story.")
    tab.page.press("#text", "Enter")
    tab.page.press("#text", "Enter")
    tab.page.wait_for_selector("#send:visible")
    assert tab.messages == ["Tell me a story.", first]
