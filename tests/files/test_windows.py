"""Folders and files appear complete or not at all under Windows' rules, too."""

import pytest

from rgexport.errors import RequestError
from rgexport.files import atomic
from rgexport.files.targets import COMPLETE, continue_file, replace_folder
from tests.files import windows_rules
from tests.files.test_atomic import content, each_kind, entries, is_ours, write


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    windows_rules.apply(monkeypatch)


@each_kind
def test_files_are_replaced_although_they_are_read_only(tmp_path, kind, capsys):
    write(tmp_path / "out", "ours, old", kind=kind)
    content(tmp_path / "out").chmod(0o444)
    write(tmp_path / "out", kind=kind, force=True)
    assert entries(tmp_path) == ["out"] and content(tmp_path / "out").read_text() == "ours"
    assert capsys.readouterr().err == ""


@each_kind
def test_what_a_program_has_open_stays(tmp_path, kind):
    write(tmp_path / "out", "ours, old", kind=kind)
    with content(tmp_path / "out").open() as reader:
        with pytest.raises(RequestError, match=r"cannot replace .*out: .*; close the programs"):
            write(tmp_path / "out", kind=kind, force=True)
        assert reader.read() == "ours, old"
    assert entries(tmp_path) == ["out"] and is_ours(tmp_path / "out")


def test_the_target_stays_where_the_second_rename_fails(tmp_path):
    """An open file in the new folder, as an engine would leave it, is such a case."""
    write(tmp_path / "out", "ours, old")
    replacing = replace_folder(tmp_path / "out", force=True, replaceable=is_ours)
    with pytest.raises(RequestError, match="cannot replace"), replacing as new:
        reader = (new / "ours").open("w")
    assert content(tmp_path / "out").read_text() == "ours, old"
    reader.close()


def test_a_file_that_a_scanner_holds_for_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_PAUSES", (0, 0, 0))
    write(tmp_path / "out", "ours, old", kind="file")
    scanner = (tmp_path / "out").open()
    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: scanner.close())
    write(tmp_path / "out", kind="file", force=True)
    assert (tmp_path / "out").read_text() == "ours" and scanner.closed


def test_work_that_a_later_run_continues(tmp_path):
    for attempt in range(2):
        with continue_file(tmp_path / "out", force=True, replaceable=is_ours) as folder:
            folder.mkdir(exist_ok=True)
            (folder / COMPLETE).write_text(f"ours, {attempt}")
    assert entries(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "ours, 1"


def test_names_that_windows_cannot_have_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"cannot write .*: the name .*; pass another -o"):
        write(tmp_path / "nul.onnx")
    assert entries(tmp_path) == []
