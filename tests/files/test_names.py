"""Names of files that keep their dots, stay in their folder, and can be stored on Windows."""

import re

import pytest

from rgexport.files.names import stays_inside, windows_objection, without_ending


def test_an_ending_is_one_of_a_list():
    names = {"a.txt": "a", "a.b.txt": "a.b", "text-4.25": "text-4.25", "a.txt.txt": "a.txt"}
    for name, expected in names.items():
        assert without_ending(name, (".txt", ".md")) == expected


@pytest.mark.parametrize(
    "name",
    ["", ".", "../a", "a/../../b", "/etc/passwd", "C:\\a", "C:a", "..\\a", "\\\\host\\a", "a\nb"],
)
def test_paths_that_lead_elsewhere_on_some_system(name):
    assert not stays_inside(name)
    for inside in ("model.onnx.data", "Data/weights/weight.bin", "./a"):
        assert stays_inside(inside)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("con", "is the name of a device"),
        ("NUL.onnx", "is the name of a device"),
        ("com1 .txt", "is the name of a device"),
        ("hf:owner", "has ':'"),
        ("a<b>?", "has '<' '>' '?'"),
        ("a\tb", r"has '\\t'"),
        ("plan-4.", "ends in a dot"),
        ("plan ", "ends in a dot or space"),
        *((name, "^$") for name in ("plan-4.25", "console", "com10", "ünï cödé", ".hidden", "a'b")),
    ],
)
def test_names_that_windows_refuses_or_takes(name, words):
    assert re.search(words, windows_objection(name))
