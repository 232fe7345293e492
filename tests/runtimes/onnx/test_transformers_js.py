"""Artifacts in transformers.js, unmodified, with the class that they bring along.

In Node, and in headless Chromium with WASM and with WebGPU, in software.
"""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rgexport
from rgexport.chat.state_file import read_fields
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.state import POSITION
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS
from tests.web.browser import HERE, chromium, run_page
from tests.web.npm import install_our_package, node_with_packages

DEMO = Path(__file__).parents[3] / "demo" / "model"
MESSAGES = ["Hi there", "What did I say?", "Tell me a story.", "Thanks!"]
TOKENS = 8
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> str:
    program = node_with_packages()
    install_our_package(tmp_path_factory.mktemp("npm"))
    return program


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Any:
    """The demo's artifacts, by profile; activations in floats."""
    folder, made = tmp_path_factory.mktemp("demo"), {}

    def export(profile: str) -> Path:
        if profile not in made:
            options = OnnxOptions(profile=profile, precision="fp32")
            made[profile] = export_onnx(open_checkpoint(str(DEMO)), options, folder / profile)
        return made[profile]

    return export


def in_node(node: str, artifact: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked = folder / "job.json"
    asked.write_text(json.dumps(job))
    command = [node, "transformers.mjs", str(artifact), str(asked)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_chromium(artifact: Path, job: dict[str, Any]) -> dict[str, Any]:
    if not chromium():
        pytest.skip("Chromium is not installed, such as Debian's chromium-headless-shell")
    found = run_page(artifact, job, page=(HERE / "transformers.html").read_text())
    assert "error" not in found, found["error"]
    assert found["logs"] == []
    return found


def continued(artifact: Path, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens, by ONNX Runtime on this machine."""
    session = OrtSession(open_artifact(artifact))
    made = [int(session.prefill(np.array([ids]))[0, -1].argmax())]
    while len(made) < count:
        made.append(int(session.step(np.array(made[-1:]))[0].argmax()))
    return made


def check_conversation(found: dict[str, Any], artifact: Path) -> None:
    """The replies are rgexport's, and each turn has read its own tokens alone."""
    messages: list = []
    with rgexport.load(artifact) as model:
        for content, turn in zip(MESSAGES, found["turns"], strict=True):
            messages.append({"role": "user", "content": content})
            reply = model.chat(messages, **GREEDY)
            messages.append({"role": "assistant", "content": reply.text})
            assert turn["messages"] == messages and turn["streamed"].strip() == reply.text
            # rgexport has read on to the end of the turn before it was asked.
            new = reply.prompt_tokens - reply.cached_tokens + reply.new_tokens
            assert new - 1 <= turn["read"] <= new + 3


def check_state(state: bytes, artifact: Path, folder: Path) -> None:
    """The file goes on in rgexport as the conversation itself, without reading it again."""
    file = folder / "js.state"
    file.write_bytes(state)
    with rgexport.load(artifact) as model:
        saved = model.load_state(file)
        more = [*saved.messages, {"role": "user", "content": "And now?"}]
        reply = model.chat(more, **GREEDY)
        assert reply.cached_tokens >= saved.position - 1
    with rgexport.load(artifact) as fresh:
        assert fresh.chat(more, **GREEDY).text == reply.text


@pytest.mark.parametrize("registered", [False, True])
def test_a_conversation_in_node(node: str, demo: Any, registered: bool, tmp_path: Path) -> None:
    artifact, ids = demo("cpu"), [2, 651, 603]
    job = {"messages": MESSAGES, "ids": ids, "save": True, "registered": registered}
    found = in_node(node, artifact, job, tmp_path)
    check_conversation(found, artifact)
    check_state(base64.b64decode(found["state"]), artifact, tmp_path)
    assert found["ids"] == continued(artifact, ids, TOKENS)


@pytest.mark.parametrize("device", ["wasm", "webgpu"])
def test_a_conversation_in_chromium(node: str, demo: Any, device: str, tmp_path: Path) -> None:
    artifact, ids = demo(device), [2, 651, 603]
    job = {"messages": MESSAGES, "ids": ids, "save": True, "device": device}
    found = in_chromium(artifact, job)
    states = len(open_artifact(artifact).manifest.states)
    remembered = 2  # of the last call: the end of its prompt, and of its reply
    assert found["live"] == (remembered * states if device == "webgpu" else 0)
    check_conversation(found, artifact)
    check_state(base64.b64decode(found["state"]), artifact, tmp_path)
    assert found["ids"] == continued(artifact, ids, TOKENS)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_state_of_ours_goes_on_in_node(
    node: str, demo: Any, precision: str, tmp_path: Path
) -> None:
    artifact, file = demo("cpu"), tmp_path / "ours.state"
    said = [{"role": "user", "content": "Hello! " * 150}]  # beyond the window
    with rgexport.load(artifact, state_precision=precision) as model:
        said.append({"role": "assistant", "content": model.chat(said, **GREEDY).text})
        saved = model.save_state(file, model.conversation_ids(said), said)
        more = [*said, {"role": "user", "content": "And now?"}]
        reply = model.chat(more, **GREEDY)
    state = base64.b64encode(file.read_bytes()).decode()
    job = {"state": state, "messages": ["And now?"], "save": True, "precision": precision}
    found = in_node(node, artifact, job, tmp_path)
    (turn,) = found["turns"]
    assert found["loaded"] == said and turn["reply"] == reply.text
    assert turn["read"] <= reply.prompt_tokens - saved.position + reply.new_tokens

    file.write_bytes(base64.b64decode(found["state"]))
    with rgexport.load(artifact) as model:
        back = model.load_state(file)
    session = OrtSession(open_artifact(artifact))
    assert back.tokens is not None
    session.prefill(back.tokens[None, : back.position])
    expected = session.get_state()
    assert expected[POSITION][0] == back.position
    limit = 2e-3 if precision == "fp16" else 2e-5
    assert back.state["layers.2.key"].dtype == (np.float16 if precision == "fp16" else np.float32)
    for name, array in back.state.items():
        assert np.abs(array - expected[name]).max() <= limit * (np.abs(expected[name]).max() + 1)


def test_foreign_and_damaged_states_are_refused(node: str, demo: Any, tmp_path: Path) -> None:
    artifact, file = demo("cpu"), tmp_path / "ours.state"
    with rgexport.load(artifact) as model:
        model.chat([{"role": "user", "content": "Hi"}], **GREEDY)
        model.save_state(file, model.text_ids("Hi"), None)
    sound = file.read_bytes()
    weights = read_fields(file)["identity"]["weights"].encode()
    wrong = {
        "damaged": sound[:-1] + bytes([sound[-1] ^ 1]),
        "no state file": sound[:20],
        "other weights": sound.replace(weights, weights[::-1]),
    }
    for message, data in wrong.items():
        state = base64.b64encode(data).decode()
        with pytest.raises(AssertionError, match=message):
            in_node(node, artifact, {"state": state}, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("narrow_lru", {"precision": "fp16"}),
        ("hawk", {"precision": "int4", "exact": True}),
        ("attention_only", {"precision": "fp32"}),
        ("not_by_32", {"precision": "fp32", "profile": "wasm"}),
    ],
)
def test_odd_shapes_in_node(node: str, name: str, options: dict, tmp_path: Path) -> None:
    """By token ids: `generate` needs no tokenizer, but the helpers do, so one is lent."""
    config = ODD_CONFIGS[name]
    artifact, _ = export_random(config, tmp_path, **options)
    lent = export_onnx(open_checkpoint(str(DEMO)), OnnxOptions(), tmp_path / "lender")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (artifact.path / file).write_bytes((lent / file).read_bytes())
    ids = np.random.default_rng(3).integers(3, config.vocab_size, 2 * config.window + 5).tolist()
    found = in_node(node, artifact.path, {"ids": ids, "most": 40}, tmp_path)
    expected = continued(artifact.path, ids, len(found["ids"]))
    assert found["ids"] == expected and (len(expected) == 40 or expected[-1] == 1)
