"""The self-check that ends an export: what it finds, what it says, and what it leaves."""

import dataclasses
import json
from pathlib import Path

import pytest

from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.export.onnx import lowering
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate import self_check as module
from tests.command_line import assert_matches, rgexport
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300, soft_cap=5.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One whose logits reach the soft cap."""
    folder = tmp_path_factory.mktemp("checked") / "model"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder, dtype="bfloat16")


@pytest.fixture
def model(checkpoint, tmp_path, monkeypatch) -> str:
    """The same, with the working directory an empty one."""
    monkeypatch.chdir(tmp_path)
    return str(checkpoint)


def export(model: str, kind: str, *options: str) -> tuple[int, object]:
    """Exports to `out` by the command line; the exit code, and what the manifest says."""
    code = run([kind, "-m", model, "-o", "out", *options])
    return code, open_artifact("out").manifest.check


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("onnx", "--int4"),
        ("coreml", "--precision pal4 --prefill-length 3 --all-logits"),
        pytest.param("gguf", "--int4", marks=needs_llama_cpp),
    ],
)
def test_clean_artifacts_are_verified(kind, options, model, capsys):
    if kind == "coreml":
        pytest.importorskip("coremltools")
    code, found = export(model, kind, *options.split())
    assert code == 0 and found.status == "verified" and not found.reason
    assert 0 <= found.kl < 1 and found.relative_max < 0.1
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith("Checked on ") and found.sentence.endswith(": verified.")
    assert line.startswith(f"{found.sentence} Quality by that KL: ")
    assert run(["inspect", "out"]) == 0 and found.sentence in capsys.readouterr().out
    assert run(["inspect", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"] == dataclasses.asdict(found)
    if kind != "gguf":
        card = Path("out/README.md").read_text("utf-8")
        assert f" tokens in {found.engine}" in card and "| verdict | verified |" in card
        assert f"over {found.positions} tokens | {found.nats} |" in card
        assert f"| {found.share} of the largest logit |" in card


def drop_soft_cap(emitter, node):
    return [emitter.op("Identity", emitter.cast(*emitter.inputs(node), "float32"))]


def give_nan(emitter, node):
    zero = emitter.constant(0, "float32")
    return [emitter.op("Mul", *drop_soft_cap(emitter, node), emitter.op("Div", zero, zero))]


def raise_two_lines(session, tokens):
    raise RuntimeError("a fault\nof two lines")


@pytest.mark.parametrize(
    ("owner", "name", "fault", "complaint"),
    [
        (lowering.LOWERINGS, "soft_cap", drop_soft_cap, "dequantized.logits is .* beyond 0.001"),
        (lowering.LOWERINGS, "soft_cap", give_nan, "is nan, beyond"),
        (OrtSession, "step", raise_two_lines, "onnxruntime .* cannot run it: a fault of two lines"),
    ],
)
def test_wrong_artifacts_stay_and_are_marked(
    owner, name, fault, complaint, model, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        change = patch.setitem if isinstance(owner, dict) else patch.setattr
        change(owner, name, fault)
        code, found = export(model, "onnx", "--int4", "--exact")
    assert code == 1 and found.status == "unverified"
    line, _ = capsys.readouterr().out.splitlines()
    assert line.startswith(found.sentence) and "partial" not in line
    assert line.endswith("Look closer: rgexport validate out")
    assert_matches(complaint, found.reason)
    assert "unverified, since" in Path("out/README.md").read_text("utf-8").replace("\n", " ")
    if fault is give_nan:  # the manifest stays JSON
        assert found.kl is None and found.relative_max is None
        assert "KL to the original not a number" in line


def test_a_check_is_left_out_on_request_or_without_memory(model, monkeypatch, capsys):
    code, found = export(model, "onnx", "--no-check")
    assert code == 0 and found.status == "skipped" and found.reason == "it was not asked for"
    assert "Not checked: it was not asked for." in Path("out/README.md").read_text("utf-8")
    capsys.readouterr()
    monkeypatch.setattr(module, "available_bytes", lambda: 200 << 20)
    code, found = export(model, "onnx", "--int4", "--force")
    assert code == 0 and found.status == "skipped"
    assert_matches(r"it takes about \d+ MB of memory, and 210 MB are free", found.reason)
    assert capsys.readouterr().out.startswith("Not checked: it takes")


def test_engine_that_is_missing(model, tmp_path):
    missing = "import sys; sys.modules['llama_cpp'] = None"
    asked = "gguf", "-m", model, "--type", "f16", "-o", "out"
    result = rgexport(*asked, folder=tmp_path, before=missing)
    assert result.returncode == 0, result.stderr
    line, _ = result.stdout.splitlines()
    assert line.startswith("Not checked: a GGUF file takes llama-cpp-python, which is missing")
    assert "rgexport llama-cpp build" in line and "rgexport validate out" in line
    assert open_artifact(tmp_path / "out").manifest.check.status == "skipped"
