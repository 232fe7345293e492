"""transformers.js: the examples of docs/transformers-js.md, and replies that a test chose."""

import base64
import json
import re

import numpy as np
import pytest

import rgexport
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.control_tokens import END_OF_TURN
from rgexport.griffin.state import POSITION
from tests.npm.browser import FOLDERS, HERE, launched, parts_of
from tests.npm.install import install_our_package, node_result, node_with_packages
from tests.web_page.site_server import serving

DEMO = HERE.parents[1] / "demo" / "model"
GUIDE = (HERE.parents[1] / "docs" / "transformers-js.md").read_text("utf-8")
TOKENS = 8
MODELS = "recurrentgemma-2b-it-int4-onnx", "recurrentgemma-2b-it-int8-onnx-wasm"
REPLIES = {
    "in other pieces": [b"H", b"e", b"l", b"l", b"o", b"."],
    "with lines that the template trims": [b"Hello", b".", b"\n", b"\n", b"\n"],
    "with a space that the template trims": [b" I", b"t", b"."],
    "cut in a character": [b"Hello", b".", b"\xf0"],
    "in other pieces, to the end of the turn": [b"H", b"i", END_OF_TURN],
    "in other pieces, to the end of the text": [b"H", b"i", "<eos>"],
}
"""Replies, piece by piece; names are those of special tokens."""

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Runs Node, which has our package; returns what it printed last."""
    node_with_packages()
    install_our_package(tmp_path_factory.mktemp("npm"))
    return node_result


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the demo under the names that the guide's models have."""
    folder = tmp_path_factory.mktemp("models")
    for name, profile in zip(MODELS, ("cpu", "wasm"), strict=True):
        options = OnnxOptions(profile=profile, precision="fp32")
        export_onnx(open_checkpoint(str(DEMO)), options, folder / name)
    return folder


def example(heading, language):
    """The first example below a heading; it writes few tokens."""
    section = GUIDE.partition(f"## {heading}\n")[2]
    text = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]
    return text.replace("max_new_tokens: 256", f"max_new_tokens: {TOKENS}")


def reply(artifact):
    with rgexport.load(artifact) as model:
        messages = [{"role": "user", "content": "Hi!"}]
        return model.chat(messages, temperature=0, max_new_tokens=TOKENS).text


def test_the_example_for_node(node, models):
    code = example("In Node", "js").replace('"/models/"', json.dumps(f"{models}/"))
    code += "\nconsole.log(JSON.stringify(generated_text));"
    printed = node("--input-type=module", "-e", code)
    assert printed[-1]["content"] == reply(models / MODELS[0])


def test_the_page_loads_nothing_from_elsewhere(node, models):
    site = {
        "index.html": example("In a browser", "html").encode(),
        **parts_of(models / MODELS[1], f"models/{MODELS[1]}"),
        **parts_of(FOLDERS["hf"], "transformers"),
        **parts_of(FOLDERS["hf-ort"], "ort"),
    }
    addresses, errors = [], []
    with serving(site) as server, launched() as browser, browser.new_page() as page:
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(server.url)
        page.wait_for_function("document.title === 'complete'", timeout=120_000)
        assert page.inner_text("body").strip() == reply(models / MODELS[1])
    assert errors == [] and all(address.startswith(server.url) for address in addresses)
    assert any(address.endswith(".wasm") for address in addresses)


def test_each_token_is_read_once(node, models, tmp_path):
    """Replies are cut, or not spelled as the tokenizer would; the next turn goes on from them."""
    artifact = models / MODELS[0]
    tokenizer = open_tokenizer(open_artifact(artifact))
    ids_of = {tokenizer.surface(i): i for i in reversed(range(tokenizer.vocab_size))}
    ids_of |= tokenizer.special
    replies = {name: [ids_of[piece] for piece in pieces] for name, pieces in REPLIES.items()}
    pieces = replies["in other pieces"]
    assert tokenizer.encode_text(tokenizer.decode(pieces)) != pieces
    job, file = tmp_path / "job.json", tmp_path / "chat.state"
    asked = [{"content": f"A reply {name}, please.", "ids": ids} for name, ids in replies.items()]
    job.write_text(json.dumps(asked))
    turns, seen = node("forced_replies.mjs", artifact, job), 0
    with rgexport.load(artifact) as model, rgexport.load(artifact) as fresh:
        for turn, (name, ids) in zip(turns, replies.items(), strict=True):
            file.write_bytes(base64.b64decode(turn["state"]))
            saved = model.load_state(file)
            assert turn["read"] == saved.position - seen, name
            seen = saved.position
            assert saved.tokens[-len(ids) :].tolist() == ids, name
            assert saved.count == saved.position + 1  # a reply's last token is not read yet
            expected = fresh.state(saved.tokens[: saved.position].tolist())
            for state in expected.keys() - {POSITION}:
                np.testing.assert_allclose(saved.state[state], expected[state], atol=0.05)
