"""Defaults from the user's configuration file and from variables."""

from pathlib import Path

import click
import pytest

from rgexport.cli import rgexport as root
from rgexport.commands.defaults import read_defaults
from tests.command_line import refused


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("RGEXPORT_CONFIG", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def test_a_command_s_table_goes_before_the_values_for_all(config, monkeypatch):
    config.write_text(
        "threads = 4\n[chat]\ntemperature = 0.5\nstop = 'END'\nno-lookup = true\n"
        "[state.save]\nthreads = 2\n[onnx]\nsymmetric = false\n"
    )
    monkeypatch.setenv("RGEXPORT_STATE_SAVE_READ", "book.txt")
    monkeypatch.setenv("RGEXPORT_BENCH_THREADS", "1")
    defaults = read_defaults(root)
    assert defaults["chat"] == {"threads": 4, "temperature": 0.5, "stop": ["END"], "lookup": False}
    assert defaults["state"]["save"] == {"threads": 2, "text": "book.txt"}
    assert defaults["bench"] == {"threads": "1"}
    assert defaults["onnx"] == {"symmetric": False} and defaults["push"] == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x =", "is not TOML"),
        ("tempratur = 1", "no command has an option --tempratur"),
        ("[chatt]\nstop = 'x'", "[chatt] is no command"),
        ("[state.sav]\nread = 'x'", "[state]: [sav] is no command"),
        ("[chat]\ntempratur = 1", "[chat] has no option --tempratur; expected some of --model"),
        ("[bench]\nformat = 'xx'", "--format is 'xx'; expected one of table, md, json, csv (from"),
        ("[bench]\nthreads = 'all'", "'all' is not a valid integer range. (from a variable"),
    ],
)
def test_a_wrong_default_is_refused(config, capsys, text, complaint):
    config.write_text(text)
    line = refused(["bench", "nothing"], capsys)
    assert complaint in line and str(config) in line


def test_what_the_command_line_names_goes_before_a_default(config, capsys):
    config.write_text("model = 'other.gguf'\n")
    for command in ("chat no.gguf", "onnx no.gguf", "inspect no.gguf", "push no.gguf me/x"):
        assert "no.gguf" in refused(command.split(), capsys)
    assert "--window is 0" in refused("onnx --size demo --window 0".split(), capsys)


def test_a_missing_file_is_refused_only_where_it_was_named(config, capsys, monkeypatch, tmp_path):
    assert "cannot read" in refused(["bench", "nothing"], capsys)
    monkeypatch.delenv("RGEXPORT_CONFIG")
    monkeypatch.setattr(click, "get_app_dir", lambda name: str(tmp_path / name))
    assert not any(values for values in read_defaults(root)["state"].values())
