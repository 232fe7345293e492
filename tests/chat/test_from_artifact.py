"""Texts, states and drafts on each kind of artifact: each engine says the same."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rgexport.artifacts.opening import open_artifact
from rgexport.chat.from_artifact import continued_ids
from rgexport.chat.model import load, open_model
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.speculation import Speculation
from rgexport.cli import run
from rgexport.commands import standard_input
from rgexport.files.safetensors import read_header
from rgexport.griffin.checkpoint import demo_folder
from tests.artifacts import export_demo
from tests.command_line import rgexport
from tests.llama_tools import installed_version

PROMPT = "It is a truth universally acknowledged, that"
REPEATED = "He was the proudest, most disagreeable man in the world. "
EXPORTS = {
    "onnx": "onnx --precision fp32",
    "gguf": "gguf --type f32",
    "coreml": "coreml --precision fp32 --prefill-length 4",
}


def export(kind: str, folder: Path) -> Path:
    """The demo in a format, from the cache."""
    target = folder / ("demo.gguf" if kind == "gguf" else kind)
    export_demo(target, *EXPORTS[kind].split(), "--no-check")
    return target


@pytest.mark.full
def test_a_state_of_one_engine_is_continued_by_each_other(tmp_path):
    """After 600 tokens, more than two windows, with the same 64 greedy tokens."""
    engines = {"onnx": True, "gguf": installed_version(), "coreml": find_spec("coremltools")}
    kinds = [kind for kind, engine in engines.items() if engine]
    artifacts = {kind: open_artifact(export(kind, tmp_path)) for kind in kinds}
    text = (demo_folder().parent / "README.md").read_text() * 9
    said = []
    for maker, artifact in artifacts.items():
        file = tmp_path / f"{maker}.state"
        with open_model(artifact, threads=1) as model:
            ids = model.text_ids(text)[:600]
            saved = model.save_state(file, ids)
        size = sum(array.nbytes for array in saved.state.values())
        assert size <= file.stat().st_size <= 1.01 * size + 4 * len(ids) + 4096
        for other in artifacts.values():
            with open_model(other, threads=1) as model:
                options = ReplyOptions(max_new_tokens=64)
                reply = model.continue_ids(continued_ids(model, "", file), options).reply()
            assert reply.cached_tokens == len(ids) - 1
            said.append(reply.ids)
    assert len(said[0]) > 8 and len({*said}) == 1


def test_a_folder_serves_only_the_artifact_that_computed_its_states(demo_artifact, tmp_path):
    """A state file that is loaded by name goes on in another artifact, but not into its folder."""
    saved, fp32 = tmp_path / "a.state", export("onnx", tmp_path)

    def known(artifact: Path, folder: str, *, loads: bool = False, **options: str) -> float:
        with load(artifact, state_folder=tmp_path / folder, **options) as model:
            if loads:
                model.load_state(saved)
            elif not saved.exists():
                model.save_state(saved, model.text_ids(PROMPT))
            reply = model.complete(PROMPT, max_new_tokens=1).reply()
            return reply.cached_tokens / reply.prompt_tokens

    known(demo_artifact, "states")
    assert known(fp32, "states") == known(demo_artifact, "states", state_precision="fp16") == 0
    assert known(demo_artifact, "states") == 1
    assert known(fp32, "empty", loads=True) > 0 and not [*tmp_path.glob("empty/*/*.state")]


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
    (tmp_path / "bad.state").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = rgexport("state", "info", "bad.state", folder=tmp_path)
    assert said.returncode == 2 and "bad.state is damaged" in said.stderr
    words = ("chat", demo_artifact, "--load-state", "a.state", "-p", "Who?")
    said = rgexport(*words, folder=tmp_path)
    assert said.returncode == 2 and "first read the text again" in said.stderr
    (tmp_path / "other.txt").write_text("Another text.")
    said = rgexport(*words, "--read", "other.txt", folder=tmp_path)
    assert said.returncode == 2 and "a.state was made from" in said.stderr
    book = (tmp_path / "book.txt").read_text()
    said = rgexport(*words, "--read", "-", "--json", folder=tmp_path, text=book)
    assert said.returncode == 0 and json.loads(said.stdout)["cached_tokens"] > 1000
    words = ("generate", demo_artifact, "--prompt-file", "book.txt", "-n", "1")
    said = rgexport(*words, folder=tmp_path)
    assert said.returncode == 0 and "cut at --max-new-tokens" in said.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_pipe_goes_before_the_prompt(command, demo_artifact, tmp_path, monkeypatch, capfd):
    """Neither an empty pipe nor one that stays open ends or holds a command up."""
    monkeypatch.setattr(standard_input, "SECONDS", 0.1)
    words = [command, str(demo_artifact), "-p", "Why?", "-n", "1", "--json"]
    states = ["--save-state", str(tmp_path / "a"), "--load-state", str(tmp_path / "a")]
    counts = []
    for text, leaves_open in ((PROMPT, False), ("", False), ("", True)):
        output, end = os.pipe()
        os.write(end, text.encode())
        if not leaves_open:
            os.close(end)
        with open(output) as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            assert run([*words, *states[:2]]) == 0
        shown = capfd.readouterr()
        counts.append(json.loads(shown.out)["prompt_tokens"])
        assert ("Nothing came from stdin" in shown.err) == leaves_open
    assert counts[0] > counts[1] + 5 and counts[1] == counts[2]
    assert run(["generate", *words[1:], *states[2:]]) == 0
    assert ("of a chat, whose template" in capfd.readouterr().err) == (command == "chat")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_nothing_is_overwritten_by_a_state(command, demo_artifact, tmp_path):
    """Neither a file of the user's nor a folder; an earlier state file is replaced."""
    (tmp_path / "thesis").write_text("my work")
    (tmp_path / "folder").mkdir()
    for name in ("thesis", "folder", "a.state", "a.state"):
        words = (command, demo_artifact, "-p", "It is", "-n", "2", "--save-state", name)
        done = rgexport(*words, folder=tmp_path)
        refusal = f"{name} exists and is not a state file; give another name"
        assert done.returncode == (0 if name == "a.state" else 2)
        assert (refusal in done.stderr) == (name != "a.state") == (not done.stdout)
    done = rgexport("chat", demo_artifact, "--load-state", "a.state", folder=tmp_path, text="")
    assert ("2 messages.\n> It is\n" in done.stderr) == (command == "chat")
    assert (tmp_path / "thesis").read_text() == "my work"
    assert {path.name for path in tmp_path.iterdir()} == {"thesis", "folder", "a.state"}


@pytest.mark.parametrize("choice", ["", "--temperature 0.8 --top-p 0.9 --seed 3"])
def test_drafts_change_no_word(choice, demo_artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Speculation, "_pass_seconds", lambda self, rows, tokens, step: step)
    draft = tmp_path / "draft.txt"
    draft.write_text("Everybody hoped that he would never come there again. " + REPEATED)
    words = ["generate", str(demo_artifact), "-p", 3 * REPEATED + "He", "-n", "70"]
    said = []
    for options in (["--no-lookup"], [], ["--draft-text", str(draft)]):
        assert run([*words, *choice.split(), *options]) == 0
        said.append(capsys.readouterr().out)
    assert len(said[0]) > 10 and said == [said[0]] * 3
