"""`generate`, `chat` and `bench` on Core ML packages, through the command line."""

from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from rgexport.cli import run
from tests.command_line import rgexport

PROMPT = "It is a truth universally acknowledged, that"
BLOCK = """
import sys
for name in ("torch", "onnx", "onnx_ir", "jax", "safetensors", "recurrentgemma"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""


@pytest.fixture(scope="module")
def demo_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model in float32, made by the command line."""
    target = tmp_path_factory.mktemp("demo") / "demo-fp32-coreml"
    request = ["coreml", "--size", "demo", "--precision", "fp32", "--prefill-length", "4"]
    assert run([*request, "-o", str(target)]) == 0
    return target


def test_it_says_what_the_onnx_model_says(
    demo_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = tmp_path / "onnx"
    assert (
        run(["onnx", "--size", "demo", "--precision", "fp32", "--no-check", "-o", str(onnx)]) == 0
    )
    said = []
    for artifact in (demo_package, onnx):
        capsys.readouterr()
        assert run(["generate", str(artifact), "-p", PROMPT, "-n", "40", "--threads", "1"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 60


def test_running_needs_no_torch(demo_package: Path, tmp_path: Path) -> None:
    asked = ["generate", demo_package, "-p", PROMPT, "-n", "8"]
    result = rgexport(*asked, folder=tmp_path, before=BLOCK)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) > 8 and "new tokens" in result.stderr


def test_chat(demo_package: Path, tmp_path: Path) -> None:
    asked = ["chat", demo_package, "-n", "8"]
    result = rgexport(*asked, folder=tmp_path, before=BLOCK, text="Hello!\nHow are you?\n")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2


def test_bench(demo_package: Path, tmp_path: Path) -> None:
    cold = "\nfrom rgexport.runtimes.bench import measure; measure.WARM_UP_SECONDS = 0"
    asked = ["bench", demo_package, "-p", "4", "-n", "2", "-r", "1"]
    result = rgexport(*asked, folder=tmp_path, before=BLOCK + cold)
    assert result.returncode == 0, result.stderr
    assert "pp4" in result.stdout and "tg2" in result.stdout
    assert "MIL interpreter" in result.stdout + result.stderr


def test_an_operation_that_nobody_knows(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named before anything runs."""
    from rgexport.runtimes.coreml.interpreter import translator

    known = {name: op for name, op in translator.OPS.items() if name != "softmax"}
    monkeypatch.setattr(translator, "OPS", known)
    assert run(["generate", str(demo_package), "-p", PROMPT, "-n", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "softmax" in error and "cannot be executed: it is no operation" in error
