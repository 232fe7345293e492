"""The command line as a whole: exit codes, streams, and a quick start."""

import html
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from rgexport import __version__, cli
from rgexport.artifacts.opening import open_artifact
from rgexport.cli import rgexport as command_line
from rgexport.cli import run
from rgexport.reporting.page import visible
from tests.command_line import ROOT, START, rgexport
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=32, heads=2, vocab_size=64)
LIST_MODULES = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"


def test_help_loads_no_package_but_click(tmp_path):
    """So that it comes at once: numpy alone takes longer than all the rest."""
    shown = rgexport("--help", folder=tmp_path, before=LIST_MODULES)
    packages = {name.partition(".")[0] for name in shown.stderr.split()} - sys.stdlib_module_names
    # Interpreters of some distributions come with a sitecustomize.
    assert packages <= {"__main__", "click", "rgexport", "_distutils_hack", "sitecustomize"}


def test_help_and_version(capsys):
    assert run([]) == run(["--version"]) == 0
    shown = capsys.readouterr().out
    assert __version__ in shown
    for command in command_line.commands:
        assert f"\n  {command} " in shown
        assert run([command, "--help"]) == 0
        assert "Usage: rgexport" in capsys.readouterr().out


def options_of(command):
    for inner in getattr(command, "commands", {}).values():
        yield from options_of(inner)
    yield from ((command.name, p) for p in command.params if isinstance(p, click.Option))


def test_every_option_has_a_help_text():
    """A verb or a noun comes first, no question word or preposition."""
    for name, option in options_of(command_line):
        first, *others = option.help.partition("[")[0].split()
        assert len(others) >= 2 and first[0].isupper(), (name, option.opts)
        assert first not in {"What", "How", "Which", "With", "Above", "Of", "As"}, option.help
        assert option.metavar != "WORD", (name, option.opts)


def test_help_fits_40_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    for command in command_line.commands.keys() - {"completion"}:  # which shows lines of scripts
        assert run([command, "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 40, command


def test_the_package_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "rgexport", "inspect", "nowhere"], capture_output=True, text=True
    )
    assert shown.returncode == 2 and shown.stderr.startswith("Error: ")


def test_help_of_commands(capsys):
    assert run(["help", "state", "save"]) == run(["state", "save", "-h"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Usage: rgexport state save [OPTIONS] [ARTIFACT]") == 2
    assert run(["help", "nothing"]) == 2
    assert "No such command 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, monkeypatch, capsys):
    assert run(["completion", shell]) == 0
    assert f"_RGEXPORT_COMPLETE={shell}_complete" in capsys.readouterr().out
    monkeypatch.setenv("_RGEXPORT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", "rgexport ser")
    monkeypatch.setenv("COMP_CWORD", "ser" if shell == "fish" else "1")
    assert run([]) == 0
    assert "serve" in capsys.readouterr().out


def test_quiet_shows_results_and_errors(demo_artifact, tmp_path, capsys):
    assert run(["inspect", str(demo_artifact), "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out and not shown.err
    assert run(["inspect", str(tmp_path / "nowhere"), "-q"]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    export = "onnx", "--size", "demo", "--quality", "fast", "-o", str(tmp_path / "a")
    assert run([*export, "-q"]) == 0
    assert not capsys.readouterr().err


def test_results_go_to_stdout_and_the_rest_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_hugging_face(CONFIG, random_weights(CONFIG), Path("mine"))
    assert run(["onnx", "-m", "mine", "--int4"]) == 0
    exported = capsys.readouterr()
    checked, closing = exported.out.splitlines()
    assert checked.startswith("Checked on 32 tokens in ")
    assert ": verified. Quality by that KL: " in checked
    assert closing.startswith("mine-int4-onnx is complete")
    assert "rgexport generate mine-int4-onnx --ids 2" in exported.out
    assert "Warning: mine has no tokenizer" in exported.err

    monkeypatch.setattr("rgexport.chat.reading._SILENT_SECONDS", 0)
    assert run(["generate", "mine-int4-onnx", "--ids", "2,5 " * 600, "-n", "4"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.split()) == 4 and all(0 <= int(i) < 64 for i in shown.out.split())
    assert "Reading: 1,200 tokens, " in shown.err


def test_demo_generates_text(demo_artifact, capsys):
    def text(*options: str) -> str:
        capsys.readouterr()
        assert run(["generate", str(demo_artifact), "-p", "The ship", "-n", "12", *options]) == 0
        return capsys.readouterr().out

    assert text() == text("--threads", "1")
    hot = ("--temperature", "2", "--top-k", "50", "--top-p", "0.99")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")


def test_json_on_stdout(demo_artifact, tmp_path):
    """Of an export, a continuation and a validation, whose `--json` also takes a file."""

    def printed(*arguments: str | Path) -> Any:
        return json.loads(rgexport(*arguments, folder=tmp_path).stdout)

    exported = printed("onnx", "demo", "--int4", "--json")
    assert exported["path"] == "demo-int4-onnx" and exported["check"]["status"] == "verified"
    assert exported["bytes"] > 8e6 and exported["quality"] in ("good", "excellent")
    reply = printed("generate", demo_artifact, "-p", "The ship", "-n", "5", "--json")
    assert len(reply["ids"]) == 5 and reply["prompt_tokens"] == 3
    assert printed("generate", demo_artifact, "--ids", "2,5", "-n", "3", "--json").keys() == {"ids"}
    few = "--tokens", "32"
    first, last = (demo_artifact, "--json"), ("--json", demo_artifact)
    assert [printed("validate", *few, *words)["verdict"] for words in (first, last)] == ["PASS"] * 2


def test_json_tells_what_a_command_wrote(demo_artifact, tmp_path, monkeypatch, capsys):
    """The size in bytes is that of the files; `push` counts what an export counts."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The sea was calm.")
    statistics = "--tokens", "64", "--held-out", "32", "--gradient-tokens", "32", "--sampled", "0"
    wrote = {
        "a.state": ["state", "save", str(demo_artifact), "--read", "text.txt", "-o", "a.state"],
        "a.calibration": ["calibrate", "demo", *statistics, "-o", "a.calibration"],
        "a.reference": ["reference", "demo", "--prompts", "text.txt", "-o", "a.reference"],
    }
    facts = {}
    for path, arguments in wrote.items():
        assert run([*arguments, "--json", "-q"]) == 0
        facts[path] = json.loads(capsys.readouterr().out)
        assert facts[path]["path"] == path and facts[path]["bytes"] == Path(path).stat().st_size
    assert facts["a.calibration"]["tokens"] >= 64
    assert run(["state", "load", str(demo_artifact), "a.state", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts["a.state"]
    assert run(["push", str(demo_artifact), "me/demo", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["repository"] == "me/demo" and planned["bytes"] == sum(planned["files"].values())
    assert planned["bytes"] == open_artifact(demo_artifact).nbytes


def test_demo_is_validated(demo_artifact, tmp_path):
    """The page shows the text of the worst positions."""
    files = "--html", "report.html", "--json", "report.json"
    shown = rgexport("validate", demo_artifact, "--tokens", "64", *files, folder=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith("PASS")
    assert len(shown.stdout.splitlines()) <= 24, "a screen"
    assert "tokens are the same" in shown.stdout and "bits per weight in matrices" in shown.stdout
    stages = [line.split("]")[0] for line in shown.stderr.splitlines() if "left" not in line]
    assert stages == [f"[{i}/{len(stages)}" for i in range(1, len(stages) + 1)] != []
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["verdict"] == "PASS" and report["quality"]["against"] == "original"
    answers = report["continuations"]
    assert [one["name"] for one in answers] == ["prose", "code", "chat turns"]
    for one in answers:
        assert one["reference"].startswith(one["shared"] + one["reference_next"])
        assert one["artifact"].startswith(one["shared"] + one["artifact_next"])
        assert (one["reference"] == one["artifact"]) is (one["common"] == one["tokens"])
    worst = report["original"]["worst"][0]
    assert worst["context"] and len(worst["reference"]) == len(worst["candidate"]) == 5
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and f"Position {worst['position']} " in page
    assert visible(worst["context"]) in html.unescape(page)


def test_inspect_is_stable_json(demo_artifact, capsys):
    assert run(["inspect", str(demo_artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[:3] == ["kind", "name", "path"]
    assert {"config", "plan", "states", "io", "files", "stored", "parameters"} <= found.keys()
    assert sum(share["weights"] for share in found["stored"]) == found["parameters"]
    assert run(["inspect", "-m", "demo", "-m", str(demo_artifact), "--json"]) == 0
    checkpoint, again = json.loads(capsys.readouterr().out)
    assert checkpoint["parameters"] == found["parameters"] and again == found
    assert run(["inspect", str(demo_artifact / "model.onnx"), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "int4/32" in shown and "rg_lru" in shown and "All hashes were verified." in shown


def test_printed_plan_exports_the_same(demo_artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", str(demo_artifact), "--json"]) == 0
    Path("plan.json").write_text(capsys.readouterr().out)
    assert run(["onnx", "--size", "demo", "--plan", "plan.json", "--no-check"]) == 0
    exported = tmp_path / "demo-4.71bit-int4-onnx"
    for name in ("model.onnx", "model.onnx.data"):
        assert (exported / name).read_bytes() == (demo_artifact / name).read_bytes()


def test_problems_make_the_answer_no(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = random_weights(CONFIG)
    weights.pop("final_norm.weight")
    weights["embed_tokens.weight"][1, 1] = float("nan")
    write_hugging_face(CONFIG, weights, Path("model"))
    for count, options in ((1, []), (2, ["--verify"])):
        assert run(["inspect", "model", *options]) == 1
        assert capsys.readouterr().out.count("Problem: ") == count


def test_verbose_shows_where_it_went_wrong(capsys):
    try:
        assert run(["inspect", "nowhere", "-v"]) == 2
        assert "Traceback" in capsys.readouterr().err
    finally:
        from rgexport import progress

        progress.verbose = False


def start_slow_export(folder: Path) -> subprocess.Popen[str]:
    """An export that sleeps after it has made its temporary folder."""
    # What a shell has started in the background would ignore interrupts.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    slow = (
        f"{heed}; import time; from rgexport.export import trace as t; "
        "t.trace = lambda *a: time.sleep(60)"
    )
    program = [sys.executable, "-c", f"{slow}\n{START}", "onnx", "--size", "demo", "-o", "out"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        program, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(".out.partial-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_interrupted_export_leaves_nothing(tmp_path):
    process = start_slow_export(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_killed_export_leaves_the_target_alone(tmp_path):
    with start_slow_export(tmp_path) as process:
        process.kill()
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())
    assert run(["onnx", "--size", "demo", "--int8", "-o", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="redirections as a POSIX shell has them")
@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("chat {} -n 4", "<&-"),
        ("chat {} -n 4", "<&- >&- 2>&-"),
        ("generate {} -p A -n 4", ">&-"),
        ("generate {} -p A -n 4", "2>&-"),
        ("inspect {}", "<&- >&- 2>&-"),
    ],
)
def test_closed_streams(command, closed, demo_artifact, tmp_path):
    before = {path: path.read_bytes() for path in demo_artifact.iterdir()}
    asked = command.format(demo_artifact).split()
    shell = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", START, *asked]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True}
    done = subprocess.run(shell, cwd=tmp_path, input=b"Hello\n", timeout=120, **options)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    silent = ">&-" in closed.split() or (asked[0] == "chat" and "<&-" in closed)
    assert bool(done.stdout) != silent
    assert b"prompt tokens" not in done.stdout
    assert {path: path.read_bytes() for path in demo_artifact.iterdir()} == before


def test_windows_pipes_carry_every_character(monkeypatch):
    """Its code pages would turn what a model writes, or is to read, into question marks."""
    monkeypatch.setattr(cli, "REDIRECTED", "utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("λ".encode()), "cp1252"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    cli._prepare_streams()
    print(sys.stdin.read(), end="", flush=True)
    assert written.getvalue() == "λ".encode()


def test_output_encoding_that_lacks_characters(tmp_path):
    write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "模型")
    assert rgexport("onnx", "-m", "模型", "-o", "out", folder=tmp_path).returncode == 0
    ascii_only = {"PYTHONIOENCODING": "ascii:strict"}
    for command, line in {"inspect 模型": "No problems", "validate out --tokens 8": "PASS"}.items():
        result = rgexport(*command.split(), folder=tmp_path, environment=ascii_only)
        assert result.returncode == 0, result.stderr
        assert line in result.stdout and result.stdout.isascii()


@pytest.mark.skipif(sys.platform != "linux", reason="names must be Unicode elsewhere")
def test_names_that_are_not_utf8(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"mod\xe8le")
    write_hugging_face(CONFIG, random_weights(CONFIG), Path(name))
    assert run(["onnx", "-m", name]) == 0
    assert run(["inspect", "mod\ufffdle-int4-onnx", "--verify"]) == 0
    assert "mod\ufffdle" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error(demo_artifact, tmp_path):
    program = [sys.executable, "-c", START, "generate", str(demo_artifact), "-p", "A", "-n", "400"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        program, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 141 and errors == ""
