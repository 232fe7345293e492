"""Artifacts in onnxruntime-genai, which runs them as they are."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rgexport
from bench.genai import MESSAGES, run
from rgexport.errors import RequestError
from rgexport.export.onnx import genai as files
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.kernels.onnx import library
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS

pytestmark = pytest.mark.full
DEMO = Path(__file__).parents[3] / "demo" / "model"
ROUNDING = 1e-4
"""Logits differ by this much between a text that is read at once and one that is read in parts."""


def export_demo(target: Path, model: Path = DEMO, **options) -> Path:
    return export_onnx(open_checkpoint(str(model)), OnnxOptions(**options), target)


def config_of(artifact: Path) -> dict:
    return json.loads((artifact / files.GENAI_CONFIG).read_text())["model"]


def require_equal(artifact: Path) -> list[str]:
    pytest.importorskip("onnxruntime_genai")
    found = run(Path(sys.executable), artifact)
    assert found["same_tokens"] and found["largest_difference"] == 0.0
    return found["replies"]


@pytest.mark.parametrize("profile", PROFILES)
def test_logits_are_onnx_runtimes(profile: str, tmp_path: Path) -> None:
    require_equal(export_demo(tmp_path / "demo", profile=profile))


@pytest.mark.parametrize(
    "options",
    [{"precision": "fp32"}, {"exact": True}, {"profile": "webgpu"}, {"precision": "fp16"}],
    ids=str,
)
def test_a_chat_is_ours(options: dict, tmp_path: Path) -> None:
    """Activations in floats; where they are rounded, a near tie may fall the other way."""
    artifact = export_demo(tmp_path / "demo", **options)
    replies = require_equal(artifact)
    messages: list = []
    with rgexport.load(artifact) as model:
        for message, reply in zip(MESSAGES, replies, strict=True):
            messages.append({"role": "user", "content": message})
            said = model.chat(messages, temperature=0, max_new_tokens=64).text
            assert said == reply
            messages.append({"role": "assistant", "content": said})


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_logits_of_odd_shapes(name: str, tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS[name], tmp_path, "int8")
    require_equal(artifact.path)


def test_our_kernels_run_in_it(tmp_path: Path) -> None:
    artifact = export_demo(tmp_path / "demo", genai_native=True)
    assert (artifact / library.LIBRARY.name).read_bytes() == library.LIBRARY.read_bytes()
    assert library.LIBRARY.name in open_artifact(artifact, verify=True).manifest.files
    named = config_of(artifact)["decoder"]["session_options"]["custom_ops_library"]
    assert named == library.LIBRARY.name
    require_equal(artifact)  # beside plain ONNX Runtime with the same kernels


def test_kernels_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(RequestError, match="changes nothing in --profile wasm"):
        OnnxOptions(profile="wasm", genai_native=True)
    monkeypatch.setenv(library.NO_NATIVE, "1")
    with pytest.raises(RequestError, match=r"--genai-native copies .* RGEXPORT_NO_NATIVE turns"):
        export_demo(tmp_path / "demo", genai_native=True)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("tuned", [True, False])
def test_a_bare_tokenizer_model_is_enough(tuned: bool, tmp_path: Path) -> None:
    """As in DeepMind's releases."""
    model = tmp_path / ("recurrentgemma-2b-it" if tuned else "recurrentgemma-2b")
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(DEMO / name, model)
    artifact = export_demo(tmp_path / "demo", model, precision="int8")
    assert config_of(artifact)["eos_token_id"] == [1, 107]
    assert json.loads((artifact / "tokenizer_config.json").read_text())["chat_template"]
    assert all(require_equal(artifact))


def test_a_tokenizer_json_is_kept(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    export_demo(tmp_path / "first", model)
    shutil.copy(tmp_path / "first" / "tokenizer.json", model)
    (model / "tokenizer.model").unlink()
    artifact = export_demo(tmp_path / "second", model)
    assert config_of(artifact) == config_of(tmp_path / "first")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (artifact / name).read_bytes() == (model / name).read_bytes()


def test_a_tokenizer_that_cannot_be_converted_is_told(tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "tokenizer.model").write_bytes(b"\xff\xff")
    artifact = export_demo(tmp_path / "demo", model)
    assert "only rgexport will take text with this artifact" in capsys.readouterr().err
    assert config_of(artifact)["eos_token_id"] == [1] and config_of(artifact)["bos_token_id"] == 2
    assert not (artifact / "tokenizer.json").exists()


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo under the name that the guide's model has."""
    pytest.importorskip("onnxruntime_genai")
    target = tmp_path_factory.mktemp("guide") / "recurrentgemma-2b-it-int4-onnx"
    return export_demo(target, precision="fp32")


def examples() -> list[str]:
    text = (DEMO.parents[1] / "docs" / "genai.md").read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_examples(folder: Path, code: str) -> dict[str, Any]:
    """Runs code as a script beside the artifact; returns its variables."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder.parent):
        exec(code, names)
    return names


@pytest.mark.parametrize("most", [2, 256])
def test_the_guides_conversation_is_ours(guided: Path, most: int, capsys) -> None:
    """Replies that are cut after two tokens, and replies that the model ends."""
    code = examples()[0].replace("most=256", f"most={most}")
    names = run_examples(guided, code.replace("\nreply(", "\nprint(); reply("))
    said = capsys.readouterr().out.strip().splitlines()
    messages: list = []
    with rgexport.load(guided) as model:
        for content, text in zip(("Hi!", "And you?"), said, strict=True):
            messages.append({"role": "user", "content": content})
            reply = model.chat(messages, temperature=0, max_new_tokens=most)
            assert text == reply.text and reply.reason == ("length" if most == 2 else "stop")
            messages.append({"role": "assistant", "content": reply.text})
    assert names["generator"].token_count() < 256


@pytest.mark.parametrize(("words", "right"), [(1, True), (300, False)])
def test_going_back_is_right_within_the_window_alone(guided: Path, words: int, right: bool) -> None:
    from bench.in_genai import Plain  # needs onnxruntime-genai

    conversation, going_back = examples()
    names = run_examples(guided, conversation.partition("\nreply(")[0])
    ids = names["tokenizer"].encode("<bos>" + "Hi! " * words).tolist()
    exec(going_back.replace('tokenizer.encode("<bos>" + turn.format("Hi!"))', str(ids)), names)
    names["generator"].append_tokens(ids[1:9])
    logits = names["generator"].get_logits().reshape(-1)
    expected = Plain(guided, None).take(ids + ids[1:9])
    assert (float(np.abs(logits - expected).max()) < ROUNDING) == right
