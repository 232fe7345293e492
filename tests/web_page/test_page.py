"""The chat page in headless Chromium, against rgexport's own replies."""

import re

import pytest

import rgexport
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.state_file import read_state_header
from rgexport.web_page import site
from tests.npm.install import HERE, node_with_packages
from tests.web_page.chat_page import LONGEST, Profile, plain
from tests.web_page.site_server import serving

MESSAGES = ["Hi there", "What did I say?", "Tell me a story.", "Thanks!"]
GREEDY = {"temperature": 0, "max_new_tokens": LONGEST}

pytestmark = pytest.mark.full


def test_a_conversation_and_its_state(tab, artifact, tmp_path):
    """The replies are rgexport's, each turn reads its own tokens alone, and the file goes on."""
    assert tab.text("engine").startswith("WASM, ")
    messages = []
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
        assert read_state_header(file).messages == messages
        saved = model.load_state(file)
        reply = model.chat([*messages, {"role": "user", "content": "And now?"}], **GREEDY)
        assert reply.cached_tokens >= saved.position - 1
    assert plain(tab.say("And now?")) == plain(reply.text)
    assert "tokens/s" in tab.text("engine")
    assert tab.said == [] and tab.text("error") == ""


def test_a_state_of_ours_is_imported(tab, artifact, tmp_path):
    file = tmp_path / "ours.state"
    said = [{"role": "user", "content": "Hello! " * 150}]  # beyond the window
    with rgexport.load(artifact("wasm")) as model:
        said.append({"role": "assistant", "content": model.chat(said, **GREEDY).text})
        saved = model.save_state(file, model.conversation_ids(said), said)
        reply = model.chat([*said, {"role": "user", "content": "And now?"}], **GREEDY)
    tab.load(file)
    tab.page.wait_for_selector("article.assistant")
    assert plain(tab.messages[0]) == plain(said[0]["content"])
    assert plain(tab.say("And now?")) == plain(reply.text)
    assert tab.tokens_read <= reply.prompt_tokens - saved.position + reply.new_tokens
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    tab.load(file)
    assert "damaged" in tab.wait_for_error() and len(tab.messages) == 4
    file.write_bytes(b"no state")
    tab.load(file)
    tab.page.wait_for_selector("#error:has-text('no state file')")
    assert tab.said == []


def test_offline_after_the_first_load(profile, wasm_site):
    with serving(wasm_site) as server:
        tab = profile.talk(server)
        first = tab.say("Hi there")
        count = len(server.asked)
    tab.reload()  # nothing answers now
    assert tab.messages == ["Hi there", first] and "tokens/s" not in tab.text("engine")
    assert tab.say("What did I say?")
    # The turn's own tokens: its four words and marks, and the reply.
    assert tab.tokens_read <= 16 + LONGEST
    assert len(server.asked) == count
    assert [line for line in tab.said if "ERR_CONNECTION_REFUSED" not in line] == []


def test_a_large_model_is_loaded_after_a_click(profile, built_page, artifact):
    with serving(site.make_site([open_artifact(artifact("wasm", "fp32"))])) as server:
        tab = profile.open(server.url)
        tab.page.wait_for_selector("#load:visible")
        assert re.fullmatch(r"Load the model \(\d\d\.\d MB\)", tab.text("load"))
        assert server.chunks == []
        tab.page.click("#load")
        tab.wait_until_open()
        server.asked.clear()
        tab.reload()
        assert server.chunks == [] and tab.said == []
        tab.page.click("summary")
        tab.agree()
        tab.page.click("#remove")
        tab.page.wait_for_selector("#load:visible")
        assert server.chunks == [], "a deleted model is not loaded again at once"
        tab.page.click("#load")
        tab.wait_until_open()
        assert server.chunks


def test_several_tabs(profile, wasm_site):
    """They download once, show each other's conversations, and do not write over them."""
    with serving(wasm_site) as server:
        first, second, *_ = tabs = [profile.open(server.url) for _ in range(4)]
        for tab in tabs:
            tab.wait_until_open()
            tab.set("longest", LONGEST)
        assert len(server.chunks) == len(set(server.chunks))
    said = first.say("Hi there")
    second.page.click("#list button")
    second.page.wait_for_selector("article.assistant")
    assert second.messages == ["Hi there", said]
    second.say("What did I say?")
    first.page.locator("article").nth(3).wait_for()
    assert first.messages == second.messages
    first.agree()
    first.page.click("#delete")
    second.page.wait_for_selector("#list:empty", state="attached")
    assert second.messages == [] and first.messages == []
    assert [line for tab in tabs for line in tab.said if "REFUSED" not in line] == []


def test_by_the_keyboard(profile, server):
    """A long reply is stopped by Escape; Shift+Enter is a new line; Tab reaches every button."""
    tab = profile.open(server.url)
    tab.wait_until_open()
    page = tab.page
    assert tab.focused() == "text"
    page.keyboard.type("Tell me a story.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("A long one.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector("article.assistant p")
    page.keyboard.press("Enter")  # which does not end the reply
    assert page.is_visible("#stop")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert tab.messages[0] == "Tell me a story.\nA long one." and tab.focused() == "text"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(tab.focused())
    assert {"new", "import", "SUMMARY", "export", "again", "delete", "log", "text"} <= reached
    page.focus("#again")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert len(tab.messages) == 2 and tab.said == [] and tab.text("error") == ""


def test_webgpu(profile, built_page, artifact):
    both = site.make_site([open_artifact(artifact(name)) for name in ("webgpu", "wasm")])
    with serving(both) as server:
        tab = profile.talk(server, "?device=webgpu")
        assert tab.text("engine") == "WebGPU"
        with rgexport.load(artifact("webgpu")) as model:
            reply = model.chat([{"role": "user", "content": "Hi there"}], **GREEDY)
        assert plain(tab.say("Hi there")) == plain(reply.text)
        assert tab.said == [] and tab.text("error") == ""
        assert profile.talk(server, "?device=wasm").text("engine").startswith("WASM")
    with serving(site.make_site([open_artifact(artifact("webgpu"))])) as server:
        tab = profile.open(f"{server.url}?device=wasm")
        assert "needs WebGPU" in tab.wait_for_error() and server.chunks == []


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(390, 844, "dark"), (820, 1180, "light"), (1440, 900, "dark")]
)
def test_looks(browser, server, width, height, scheme):
    """In every state, nothing is wider than the window, and axe-core finds nothing."""
    node_with_packages()
    axe = (HERE / "node_modules" / "axe-core" / "axe.min.js").read_text()

    def check():
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        result = page.evaluate(f"async () => {{ {axe}; return await axe.run(); }}")
        assert [f"{each['id']}: {each['help']}" for each in result["violations"]] == []
        assert len(result["passes"]) > 10

    viewport = {"width": width, "height": height}
    with browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True) as context:
        tab = Profile(context).open(server.url)
        page = tab.page
        tab.wait_until_open()
        page.evaluate("document.getElementById('load').hidden = false")
        for hidden, shown in (("talk", "welcome"), ("welcome", "talk")):
            page.evaluate(f"document.getElementById('{hidden}').hidden = true")
            page.evaluate(f"document.getElementById('{shown}').hidden = false")
            check()
        tab.say("Tell me a story. " + "Averylongword" * 20)
        for each in ("unsaved", "notice", "error"):
            page.evaluate(f"document.getElementById('{each}').textContent = 'Storage is full.'")
        check()
        if page.is_visible("#menu"):
            assert not page.is_visible("#new")
            page.click("#menu")
            assert page.get_attribute("#menu", "aria-expanded") == "true"
        page.wait_for_selector("#new:visible")
        page.click("summary")
        page.wait_for_selector("#temperature:visible")
        page.wait_for_timeout(300)  # the panel moves
        check()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert tab.said == []
