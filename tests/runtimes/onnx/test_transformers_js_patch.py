"""The patch that docs/development proposes for transformers.js, applied to its sources."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rgexport
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.command_line import ROOT
from tests.models import ODD_CONFIGS
from tests.web.npm import HERE, node_with_packages

PATCH = ROOT / "docs" / "development" / "transformers-js" / "recurrent_gemma.patch"
SOURCES = HERE / "node_modules" / "@huggingface" / "transformers" / "src"

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def patched() -> Any:
    """The library's sources with the patch, where Node finds what they import."""
    node_with_packages()
    if not shutil.which("patch"):
        pytest.skip("the program patch is not installed")
    folder = HERE / "node_modules" / f".patched-{os.getpid()}"
    shutil.copytree(SOURCES, folder / "src")
    shutil.copy(SOURCES.parent / "package.json", folder)
    command = ["patch", "-p3", "--fuzz=0", "-i", PATCH]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    yield folder / "src" / "transformers.js"
    shutil.rmtree(folder)


def in_node(library: Path, artifact: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    asked = folder / "job.json"
    asked.write_text(json.dumps(job))
    command = ["node", "patched.mjs", library, artifact, asked]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(json.loads(done.stdout.splitlines()[-1]))


def told(artifact: Path, ids: list[int], turns: list[list[int]], most: int) -> list[int]:
    """The whole text by ONNX Runtime on this machine, read anew at each turn."""
    text = list(ids)
    for turn in turns:
        text += turn
        session = OrtSession(open_artifact(artifact))
        logits = session.prefill(np.array([text]))[0, -1]
        for step in range(most):
            if step:
                logits = session.step(np.array(text[-1:]))[0]
            text.append(int(logits.argmax()))
            if text[-1] == 1:
                break
    return text


def test_the_demo_chats(patched: Path, tmp_path: Path) -> None:
    options = OnnxOptions(precision="fp32")
    artifact = export_onnx(open_checkpoint(size="demo"), options, tmp_path / "demo")
    messages = [{"role": "user", "content": "Hi there"}]
    job = {"ids": [2, 651, 603], "turns": [[]], "most": 8, "messages": messages}
    found = in_node(patched, artifact, job, tmp_path)
    assert found["type"] == "RecurrentGemmaForCausalLM"
    with rgexport.load(artifact) as model:
        reply = model.chat(messages, temperature=0, max_new_tokens=8)
    assert found["reply"] == reply.text


@pytest.mark.parametrize("name", ["narrow_lru", "hawk", "attention_only"])
def test_turns_go_on_from_the_states(patched: Path, name: str, tmp_path: Path) -> None:
    """Past the window, where the size of a ring does not tell how many tokens were seen."""
    config = ODD_CONFIGS[name]
    artifact, _ = export_random(config, tmp_path)
    drawn = np.random.default_rng(5).integers(3, config.vocab_size, 3 * config.window)
    ids, turns = drawn[: config.window + 3].tolist(), [[], drawn[-5:].tolist(), [7]]
    found = in_node(patched, artifact.path, {"ids": ids, "turns": turns, "most": 6}, tmp_path)
    assert found["text"] == told(artifact.path, ids, turns, 6)
    assert found["seen"] == len(found["text"]) - 1
