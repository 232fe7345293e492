"""`generate` and `chat` on each kind of artifact, through the command line."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from rgexport.chat.model import load
from rgexport.chat.speculation import Speculation
from rgexport.cli import run
from rgexport.export.onnx.native import native_ops
from rgexport.griffin.safetensors_file import read_header
from tests.artifacts import export_demo, export_random_gguf
from tests.command_line import rgexport
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS

PROMPT = "It is a truth universally acknowledged, that"
BLOCK = """
import sys
for name in ("torch", "onnx", "onnx_ir", "jax", "safetensors", "recurrentgemma"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""
EXPORTS = {
    "onnx": "onnx --precision fp32",
    "gguf": "gguf --type f32",
    "coreml": "coreml --precision fp32 --prefill-length 4",
}
KINDS = [
    pytest.param("gguf", marks=needs_llama_cpp),
    pytest.param("coreml", marks=pytest.mark.skipif(not find_spec("coremltools"), reason="none")),
]


def export(kind: str, folder: Path) -> Path:
    target = folder / ("demo.gguf" if kind == "gguf" else kind)
    export_demo(target, *EXPORTS[kind].split(), "--no-check")
    return target


@pytest.fixture(scope="module", params=KINDS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, in each format that is not ONNX."""
    return export(request.param, tmp_path_factory.mktemp("demo"))


def test_it_says_what_the_onnx_model_says(artifact, tmp_path, capsys):
    said = []
    for path in (artifact, export("onnx", tmp_path)):
        capsys.readouterr()
        assert run(["generate", str(path), "-p", PROMPT, "-n", "40", "--threads", "1"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 60


def test_chat_needs_no_torch(artifact: Path, tmp_path: Path) -> None:
    asked = ["chat", artifact, "-n", "8", "--threads", "1"]
    result = rgexport(*asked, folder=tmp_path, before=BLOCK, text="Hello!\n<end_of_turn>\n")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2


@needs_llama_cpp
def test_ids_without_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    assert run(["generate", str(artifact.path), "--ids", "3,4,5", "-n", "4"]) == 0
    assert len(capsys.readouterr().out.split()) == 4
    assert run(["generate", str(artifact.path), "-p", PROMPT]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("Error")]
    assert "has no vocabulary" in line


def test_a_folder_serves_only_the_artifact_that_computed_its_states(demo_artifact, tmp_path):
    """A state file that is loaded by name goes on in another artifact, but not into its folder."""
    states, saved = tmp_path / "states", tmp_path / "a.state"
    ask = {"max_new_tokens": 1, "temperature": 0.0}
    with load(demo_artifact, state_folder=states) as model:
        model.complete(PROMPT, **ask).reply()
        model.save_state(saved, model.text_ids(PROMPT))
    fp32 = export("onnx", tmp_path)
    with load(fp32, state_folder=states) as model:
        assert model.complete(PROMPT, **ask).reply().cached_tokens == 0
    with load(fp32, state_folder=tmp_path / "empty") as model:
        model.load_state(saved)
        assert model.complete(PROMPT, **ask).reply().cached_tokens > 0
    assert not [*tmp_path.glob("empty/*/*.state")]
    for changed in ({"state_precision": "fp16"}, {}):
        with load(demo_artifact, state_folder=states, **changed) as model:
            again = model.complete(PROMPT, **ask).reply()
            assert again.cached_tokens == (0 if changed else again.prompt_tokens)


def test_a_state_without_its_text(demo_artifact: Path, tmp_path: Path) -> None:
    """Its size is that of the states: less than 1 % is added."""
    (tmp_path / "book.txt").write_text(PROMPT * 200)
    words = ("state", "save", demo_artifact, "--read", "book.txt", "--no-text", "-o", "a.state")
    said = rgexport(*words, folder=tmp_path)
    assert said.returncode == 0 and "--load-state a.state --read TEXT" in said.stdout
    header, data = read_header(tmp_path / "a.state"), (tmp_path / "a.state").read_bytes()
    assert len(data) < 1.01 * sum(entry.nbytes for entry in header.values())
    assert PROMPT.encode() not in data
    said = rgexport("state", "info", "a.state", folder=tmp_path)
    assert "not stored, only its hash" in said.stdout
    words = ("chat", demo_artifact, "--load-state", "a.state", "-p", "Who?")
    said = rgexport(*words, folder=tmp_path)
    assert said.returncode == 2 and "first read the text again" in said.stderr
    said = rgexport(*words, "--read", "book.txt", "--json", folder=tmp_path)
    assert said.returncode == 0 and json.loads(said.stdout)["cached_tokens"] > 1000
    words = ("generate", demo_artifact, "--prompt-file", "book.txt", "-n", "1")
    said = rgexport(*words, folder=tmp_path)
    assert said.returncode == 0 and "cut at --max-new-tokens" in said.stderr


@pytest.mark.parametrize("command", [("generate", "-p", "It is"), ("chat", "-p", "Hello!")])
def test_nothing_is_overwritten_by_a_state(command, demo_artifact, tmp_path):
    """Neither a file of the user's nor a folder; an earlier state file is replaced."""
    (tmp_path / "thesis").write_text("my work")
    (tmp_path / "folder").mkdir()
    words = (command[0], demo_artifact, *command[1:], "-n", "2", "--save-state")
    for name in ("thesis", "folder"):
        found = rgexport(*words, name, folder=tmp_path)
        assert found.returncode == 2 and not found.stdout
        assert f"{name} exists and is not a state file; give another name" in found.stderr
    assert (tmp_path / "thesis").read_text() == "my work"
    for _ in range(2):
        assert rgexport(*words, "a.state", folder=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"thesis", "folder", "a.state"}


REPEATED = "He was the proudest, most disagreeable man in the world. "
CHOICES = {
    "greedy": [],
    "by_chance": ["--temperature", "0.8", "--top-p", "0.9", "--seed", "3"],
    "with_penalties": ["--repetition-penalty", "1.2", "--stop", "man"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_drafts_change_no_word(choice, demo_artifact, tmp_path, monkeypatch, capsys):
    """All that is drafted is tried, whether it pays or not."""
    monkeypatch.setattr(Speculation, "_time", lambda self, rows, tokens, step: step)
    draft = tmp_path / "draft.txt"
    draft.write_text("Everybody hoped that he would never come there again. " + REPEATED)
    words = ["generate", str(demo_artifact), "-p", 3 * REPEATED + "He", "-n", "70"]
    said = []
    for options in (["--no-lookup"], [], ["--draft-text", str(draft)]):
        assert run([*words, *CHOICES[choice], *options]) == 0
        said.append(capsys.readouterr().out)
    assert len(said[0]) > 10 and said == [said[0]] * 3


def test_drafts_are_right_where_a_text_repeats_itself(demo_artifact: Path) -> None:
    if native_ops(demo_artifact / "model.onnx").exact_tokens == 1:
        pytest.skip("no native kernels here: not built, or turned off")
    with load(demo_artifact) as model:
        model.complete(6 * REPEATED, max_new_tokens=60).reply()
        counters = model.scheduler.counters
    assert 0 < counters.accepted_tokens <= counters.drafted_tokens
    assert counters.steps < 60


def test_a_text_that_is_not_there_is_no_draft(demo_artifact, capsys):
    words = ["generate", str(demo_artifact), "-n", "1", "--draft-text", "none.txt"]
    assert run([*words, "-p", "He"]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert run([*words, "--ids", "2,3"]) == 2
    assert "--draft-text" in capsys.readouterr().err
    assert run([*words, "-p", "He", "--no-lookup"]) == 2
    assert "changes nothing with --no-lookup" in capsys.readouterr().err
