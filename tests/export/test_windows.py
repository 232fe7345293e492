"""Exports under Windows' rules: nothing of the new folder is open when it is renamed."""

import os
from pathlib import Path, PureWindowsPath

import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.hub import is_hub_name, parse
from rgexport.export.request import as_argument
from rgexport.files.atomic import require_free_disk
from tests.files import windows_rules


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [["onnx", "--int4"], ["gguf", "--type", "f32"], ["coreml", "--precision", "fp16"]]
)
def test_every_format_is_exported_checked_and_replaced(options, tmp_path, monkeypatch):
    windows_rules.apply(monkeypatch)
    target = tmp_path / "models" / "out"
    target.parent.mkdir()
    for more in ([], ["--force"]):
        assert run([*options, "--size", "demo", "-o", str(target), *more]) == 0
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("text", ["hf:a/b", "hf:a/b@refs/pr/1", "hf:a/b/c/d.gguf@v1"])
def test_names_of_the_hub_are_no_paths(text):
    path = PureWindowsPath(text)
    assert "\\" in str(path) and is_hub_name(path)
    assert parse(path) == parse(text)


def test_paths_are_quoted_for_its_shell(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        quoted = as_argument(PureWindowsPath("C:\\my models\\out"))
    assert quoted == '"C:\\my models\\out"'


def test_a_drive_that_is_not_there(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(RequestError, match=r"cannot write .*: there is no drive"):
        require_free_disk(Path("out"), 1)
