"""The same files in stock onnxruntime-web and transformers.js, without our kernels or conversion.

In Node with WASM, and in headless Chromium with WASM and with WebGPU, in software.
"""

import base64
import json
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

import rgexport
from rgexport.artifacts.opening import open_artifact
from rgexport.export.onnx.profiles import PROFILES, FileLimit
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_demo, export_random
from tests.command_line import ROOT
from tests.models import ODD_CONFIGS
from tests.npm.browser import HERE, run_page
from tests.npm.install import install_our_package, node_result, node_with_packages

SHARE = 1e-3  # largest |Δlogit| allowed, as a share of the largest |logit|
ON_A_PROCESSOR = set("Cast Concat Cos Neg Reshape Shape Sin Slice Squeeze Unsqueeze".split())
"""The ops of a WebGPU graph that ONNX Runtime runs on the CPU, as they handle shapes and int64."""
MESSAGES = ["Hi there", "What did I say?", "Tell me a story.", "Thanks!"]
IDS, TOKENS = [2, 651, 603], 8
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Node, with onnxruntime-web, transformers.js and our package."""
    node_with_packages()
    install_our_package(tmp_path_factory.mktemp("npm"))


def check(logits, artifact, chunks):
    """Compares the logits after each chunk with ONNX Runtime's on this machine's processor."""
    session = OrtSession(artifact)
    expected = np.concatenate([session.prefill(np.array([chunk]))[0] for chunk in chunks])
    assert np.abs(np.array(logits) - expected).max() <= SHARE * np.abs(expected).max()


def random_chunks(vocabulary, *lengths):
    random = np.random.default_rng(5)
    return [random.integers(0, vocabulary, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("profile", "precision", "exact"),
    [
        ("wasm", "fp16", False),
        ("wasm", "int8", False),
        ("wasm", "int4", False),
        ("cpu", "int8", True),  # at accuracy level 4, WASM does not round as others do
        ("cpu", "int4", True),
        ("cpu", "fp32", False),
    ],
)
def test_runs_in_node(node, profile, precision, exact, tmp_path):
    config = ODD_CONFIGS["narrow_lru"]
    artifact, _ = export_random(config, tmp_path, precision, profile=profile, exact=exact)
    chunks = random_chunks(config.vocab_size, 1, 1, config.window + 2, config.window + 5)
    logits = node_result("run.mjs", artifact.path, json.dumps(chunks), timeout=120)
    check(logits, artifact, chunks)


@pytest.mark.parametrize(
    ("profile", "precision"),
    [("wasm", "int8"), ("webgpu", "int4"), ("webgpu", "int8"), ("webgpu", "fp32")],
)
def test_odd_shapes_in_chromium(node, profile, precision, tmp_path, monkeypatch):
    """Rows that are no whole blocks, a ring that wraps around, and weights in many files."""
    config = ODD_CONFIGS["not_by_32"]
    files = FileLimit(filled=1 << 14, largest=1 << 20)
    monkeypatch.setitem(PROFILES, profile, replace(PROFILES[profile], files=files))
    artifact, _ = export_random(config, tmp_path, precision, profile=profile)
    assert sum(name.startswith("model.onnx.data") for name in artifact.manifest.files) > 2
    chunks = random_chunks(config.vocab_size, 1, 1, config.window + 2, 3)
    shown = run_page(artifact.path, {"provider": profile, "chunks": chunks})
    assert "error" not in shown, shown["error"]
    check(shown["logits"], artifact, chunks)


def test_a_graphics_card_computes_all_but_shapes(node, tmp_path):
    """By ONNX Runtime's log of where it places each node."""
    artifact, _ = export_random(ODD_CONFIGS["not_by_32"], tmp_path, "int4", profile="webgpu")
    shown = run_page(artifact.path, {"provider": "webgpu", "chunks": [], "verbose": True})
    assert "error" not in shown, shown["error"]
    placed = defaultdict(Counter)
    for line in shown["logs"]:
        if match := re.search(r"placed on \[(\w+)\]", line):
            provider = match[1]
        elif match := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line):
            placed[provider][match[1]] += 1
    assert placed["WebGpuExecutionProvider"]["LinearAttention"] == 2
    assert placed["CPUExecutionProvider"].keys() <= ON_A_PROCESSOR
    assert placed["WebGpuExecutionProvider"].total() > 9 * placed["CPUExecutionProvider"].total()


def demo(folder, profile="cpu"):
    """Exports the demo, with activations in floats."""
    options = "--precision", "fp32", "--profile", profile, "--no-check"
    export_demo(folder / "demo", "onnx", *options)
    return folder / "demo"


def in_node(program, artifact, folder, job, *before):
    """Returns what a program beside tests/npm's prints after a job in `folder`."""
    (folder / "job.json").write_text(json.dumps(job))
    return node_result(program, *before, artifact, folder / "job.json")


def continued(artifact, ids, count):
    """The likeliest tokens, by ONNX Runtime on this machine, as far as the end of a text."""
    session = OrtSession(open_artifact(artifact))
    made = [int(session.prefill(np.array([ids]))[0, -1].argmax())]
    while len(made) < count and made[-1] != 1:
        made.append(int(session.step(np.array(made[-1:]))[0].argmax()))
    return made


def check_conversation(shown, artifact, folder):
    """The replies are rgexport's, and each turn has read its own tokens alone.

    The saved state goes on in rgexport as the conversation itself, without reading it again.
    """
    messages = []
    with rgexport.load(artifact) as model:
        for content, turn in zip(MESSAGES, shown["turns"], strict=True):
            messages.append({"role": "user", "content": content})
            reply = model.chat(messages, **GREEDY)
            messages.append({"role": "assistant", "content": reply.text})
            assert turn["messages"] == messages and turn["streamed"].strip() == reply.text
            # rgexport has read on to the end of the turn before it was asked.
            new = reply.prompt_tokens - reply.cached_tokens + reply.new_tokens
            assert new - 1 <= turn["read"] <= new + 3
    (folder / "js.state").write_bytes(base64.b64decode(shown["state"]))
    with rgexport.load(artifact) as model, rgexport.load(artifact) as fresh:
        saved = model.load_state(folder / "js.state")
        more = [*saved.messages, {"role": "user", "content": "And now?"}]
        reply = model.chat(more, **GREEDY)
        assert reply.cached_tokens >= saved.position - 1
        assert fresh.chat(more, **GREEDY).text == reply.text
    assert shown["ids"] == continued(artifact, IDS, TOKENS)


@pytest.mark.parametrize("registered", [False, True])
def test_a_conversation_in_node(node, registered, tmp_path):
    artifact = demo(tmp_path)
    job = {"messages": MESSAGES, "ids": IDS, "save": True, "registered": registered}
    shown = in_node("transformers.mjs", artifact, tmp_path, job)
    check_conversation(shown, artifact, tmp_path)


@pytest.mark.parametrize("device", ["wasm", pytest.param("webgpu", marks=pytest.mark.nightly)])
def test_a_conversation_in_chromium(node, device, tmp_path):
    artifact = demo(tmp_path, device)
    job = {"messages": MESSAGES, "ids": IDS, "save": True, "device": device}
    shown = run_page(artifact, job, page=(HERE / "transformers.html").read_text())
    assert "error" not in shown and shown["logs"] == []
    states = len(open_artifact(artifact).manifest.states)
    remembered = 2  # of the last call: the end of its prompt, and of its reply
    assert shown["live"] == (remembered * states if device == "webgpu" else 0)
    check_conversation(shown, artifact, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_state_of_ours_goes_on_in_node(node, precision, tmp_path):
    artifact, file = demo(tmp_path), tmp_path / "ours.state"
    said = [{"role": "user", "content": "Hello! " * 150}]  # beyond the window
    with rgexport.load(artifact, state_precision=precision) as model:
        said.append({"role": "assistant", "content": model.chat(said, **GREEDY).text})
        saved = model.save_state(file, model.conversation_ids(said), said)
        more = [*said, {"role": "user", "content": "And now?"}]
        reply = model.chat(more, **GREEDY)
    state = base64.b64encode(file.read_bytes()).decode()
    job = {"state": state, "messages": ["And now?"], "precision": precision}
    shown = in_node("transformers.mjs", artifact, tmp_path, job)
    (turn,) = shown["turns"]
    assert shown["loaded"] == said and turn["reply"] == reply.text
    assert turn["read"] <= reply.prompt_tokens - saved.position + reply.new_tokens


def test_turns_go_on_from_the_states_in_a_patched_library(node, tmp_path):
    """Past the window, where the size of a ring does not tell how many tokens were seen."""
    if not shutil.which("patch"):
        pytest.skip("the program patch is not installed")
    sources = HERE / "node_modules" / "@huggingface" / "transformers"
    shutil.copytree(sources / "src", tmp_path / "src")
    shutil.copy(sources / "package.json", tmp_path)
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    patch = ROOT / "docs" / "development" / "transformers-js" / "recurrent_gemma.patch"
    command = ["patch", "-p3", "--fuzz=0", "-i", patch]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    library = tmp_path / "src" / "transformers.js"
    for name in ("narrow_lru", "hawk", "attention_only"):
        config = ODD_CONFIGS[name]
        artifact, _ = export_random(config, tmp_path / name)
        drawn = np.random.default_rng(5).integers(3, config.vocab_size, 3 * config.window).tolist()
        text, turns = drawn[: config.window + 3], [[], drawn[-5:], [7]]
        job = {"ids": list(text), "turns": turns, "most": 6}
        shown = in_node("patched.mjs", artifact.path, tmp_path, job, library)
        for turn in turns:  # read anew each time
            text += turn
            text += continued(artifact.path, text, 6)
        assert shown["text"] == text and shown["seen"] == len(text) - 1
