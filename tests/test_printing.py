"""What is printed: tables, and text whose control characters are escaped in one place."""

import ast
import io
import json
from pathlib import Path

import pytest

import rgexport
from rgexport.chat.terminal import print_pieces
from rgexport.errors import MOST_SHOWN, one_line, printable
from rgexport.printing import print_result, wrapped
from rgexport.progress import note
from rgexport.reporting.tables import Table, render

HARMFUL = {
    "clear": ("a\x1b[2Jb", "a\\u001b[2Jb"),
    "title": ("\x1b]0;x\x07", "\\u001b]0;x\\u0007"),
    "link": ("\x1b]8;;http://a\x1b\\b", "\\u001b]8;;http://a\\u001b\\b"),
    "one byte": ("\x9b2J", "\\u009b2J"),
    "delete": ("a\x7f\x08", "a\\u007f\\b"),
    "override": ("model\u202egpj.exe", "model\\u202egpj.exe"),
    "isolate": ("\u2066a\u2069", "\\u2066a\\u2069"),
    "tag": ("a\U000e0041", "a\\udb40\\udc41"),
    "surrogate": ("\udc9b", "\\udc9b"),
    "return": ("good\rbad", "good\\rbad"),
}
LEGIT = ["漢字\u3000é", "👨\u200d👩\u200d👧 ❤\ufe0f", "می\u200cخواهم", "a\u00a0b", "שלום", "\u0378"]


@pytest.mark.parametrize("case", HARMFUL)
def test_control_characters_are_escaped_wherever_text_is_printed(case, capsys):
    text, shown = HARMFUL[case]
    print_result(text)
    assert capsys.readouterr().out == f"{shown}\n"
    note(text)
    assert capsys.readouterr().err == f"{shown}\n"
    assert shown in render([Table(text, (text,), [(text,)]), text])
    if case != "return":
        assert one_line(text) == shown


@pytest.mark.parametrize("text", LEGIT)
def test_other_text_stays(text, capsys):
    assert printable(text) == text
    print_result(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_only_too_long_a_line_is_cut():
    longest = "x" * MOST_SHOWN
    assert one_line(longest) == longest and "x ... x" in one_line(longest + "x")


def test_json_means_the_same_afterwards(capsys):
    fields = {"name": "".join(text for text, _ in HARMFUL.values() if text != "\udc9b")}
    print_result(json.dumps(fields, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == fields


def test_replies_are_escaped_and_wrapped_on_terminals_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    for is_terminal, shown in ((False, "\x1b[2J\u200f beta\n"), (True, "\\u001b[2J\u200f\nbeta\n")):
        stream = io.StringIO()
        stream.isatty = lambda answer=is_terminal: answer
        print_pieces(["\x1b[2J\u200f be", "ta"], stream)
        assert stream.getvalue() == shown


PRINTS = "print", "click.echo", "click.secho", "stream.write", "sys.stdout.write"


def test_nothing_prints_elsewhere():
    """One module runs as a program; what it prints is for developers."""
    package = Path(rgexport.__file__).parent
    printing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTS
    }
    programs = {"kernels/build.py"}
    log = {"kernels/llama_cpp/build.py"}
    assert printing == {"printing.py", "progress.py", *programs, *log}


def test_lines_and_tables():
    assert render(["x" * 300]) == "x" * 300 + "\n"
    rows = [("embedding [x]", "1"), ("linear", "1,000")]
    shown = render(["All of it:", Table("Weights", ("role", "count"), rows, {"count"})])
    lines = ["All of it:", "Weights", "role            count", "─" * 21]
    lines += ["embedding [x]       1", "linear          1,000", ""]
    assert [line.rstrip() for line in shown.splitlines()] == lines


def test_where_a_table_does_not_fit_its_rows_are_lists(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    wide = Table("Costs", ("tensor", "mean error", "share"), [("a" * 20, "0.5 ± 0.1", "1.25 %")])
    lines = ["Costs", "a" * 20, "  mean error: 0.5 ± 0.1", "  share: 1.25 %", ""]
    assert render([wide]).splitlines() == lines


@pytest.mark.parametrize("columns", [40, 80, None])
def test_lines_break_between_words_and_commands_stay_whole(columns):
    command = "rgexport chat a-folder-with-a-long-name-int4-onnx --threads 2"
    text = f"a-folder-with-a-long-name-int4-onnx is complete (8.80 MB). Chat with it: {command}"
    lines = wrapped(f"{text}\n\nshort", columns).splitlines()
    assert lines[-2:] == ["", "short"] and " ".join(map(str.strip, lines[:-2])) == text
    assert (f"  {command}" in lines) is (columns is not None)
    assert all(len(line) <= (columns or 200) for line in lines if command not in line)
