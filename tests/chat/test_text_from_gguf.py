"""`generate` and `chat` on GGUF files, through the command line."""

import sys
from pathlib import Path

import pytest

from rgexport.cli import run
from rgexport.runtimes.llama_cpp import library as llama_cpp_library
from tests.artifacts import export_random_gguf
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS

PROMPT = "It is a truth universally acknowledged, that"


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model in float32, made by the command line."""
    target = tmp_path_factory.mktemp("demo") / "demo-F32.gguf"
    assert run(["gguf", "--size", "demo", "--type", "f32", "--no-check", "-o", str(target)]) == 0
    return target


@needs_llama_cpp
def test_it_says_what_the_onnx_model_says(
    demo_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = tmp_path / "onnx"
    assert (
        run(["onnx", "--size", "demo", "--precision", "fp32", "--no-check", "-o", str(onnx)]) == 0
    )
    said = []
    for artifact in (demo_gguf, onnx):
        capsys.readouterr()
        request = ["generate", str(artifact), "-p", PROMPT, "-n", "40", "--threads", "1"]
        assert run(request) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 60


@needs_llama_cpp
def test_chat(
    demo_gguf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hello! How are you?\n", "<end_of_turn>\n", ""])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines), raising=False)
    assert run(["chat", str(demo_gguf), "-n", "12", "--threads", "1"]) == 0
    assert len(capsys.readouterr().out.strip()) > 5


@needs_llama_cpp
def test_ids_without_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    assert run(["generate", str(artifact.path), "--ids", "3,4,5", "-n", "4"]) == 0
    assert len(capsys.readouterr().out.split()) == 4
    assert run(["generate", str(artifact.path), "-p", PROMPT]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Error")]
    assert "has no vocabulary" in line


def test_without_llama_cpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    llama_cpp_library.bindings.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    capsys.readouterr()
    assert run(["generate", str(artifact.path), "--ids", "3"]) == 2
    llama_cpp_library.bindings.cache_clear()
    assert capsys.readouterr().err == (
        "Error: a GGUF file takes llama-cpp-python, which is missing; `rgexport llama-cpp build` "
        "installs the one that runs RecurrentGemma\n"
    )
