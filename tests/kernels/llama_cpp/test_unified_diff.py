"""Diffs made by the standard library, applied by ours."""

from difflib import unified_diff

import pytest

from rgexport.kernels.llama_cpp.unified_diff import apply, parse

TEXT = "".join(f"line {i}\n" for i in range(40))
CHANGED = TEXT.replace("line 10\n", "line 10\nnew\n\n").replace("line 30\n", "")
DIFF = unified_diff(TEXT.splitlines(True), CHANGED.splitlines(True), "a/file", "b/file", n=1)
HUNKS = parse("".join([*DIFF, "diff --git a/other b/other\n"]))["file"]


def moved(text: str) -> str:
    return "above\n" * 100 + text.replace("line 20\n", "line 20\nbetween\n")


@pytest.mark.parametrize("change", [str, moved, lambda text: text.replace("\n", "\r\n")])
def test_is_applied_once_wherever_the_lines_are(change):
    assert apply(HUNKS, change(TEXT)) == change(CHANGED)
    assert apply(HUNKS, change(CHANGED)) == change(CHANGED)


@pytest.mark.parametrize("line", ["line 10\n", "line 11\n", "line 30\n"])
def test_lines_that_are_missing_do_not_fit(line):
    assert apply(HUNKS, TEXT.replace(line, "")) is None


def test_a_choice_of_places_does_not_fit():
    assert apply(HUNKS, TEXT + TEXT) is None
