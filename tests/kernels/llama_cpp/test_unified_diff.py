"""Diffs made by the standard library, applied by ours."""

from difflib import unified_diff

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.kernels.llama_cpp.unified_diff import Mismatch, apply, parse

LINES = st.lists(st.sampled_from([*"abcdefgh", "", " x", "+y", "-z", "\\"]), max_size=30)
TEXT = "".join(f"line {i}\n" for i in range(40))
CHANGED = TEXT.replace("line 10\n", "line 10\nnew\n").replace("line 30\n", "")


def hunks_between(before: str, after: str):
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    return parse("".join(unified_diff(*lines, "a/file", "b/file"))).get("file", ())


@given(LINES, LINES)
def test_applies_and_undoes_what_difflib_finds(before, after):
    texts = ["".join(f"{line}\n" for line in lines) for lines in (before, after)]
    hunks = hunks_between(*texts)
    assert apply(hunks, texts[0]) == texts[1]
    assert apply([hunk.reversed() for hunk in hunks], texts[1]) == texts[0]


@pytest.mark.parametrize("above, between", [(0, 5), (7, 0), (100, 1), (0, 0)])
def test_finds_lines_that_moved(above, between):
    def moved(text: str) -> str:
        text = "".join(f"above {i}\n" for i in range(above)) + text
        return text.replace("line 20\n", "line 20\n" + "between\n" * between)

    assert apply(hunks_between(TEXT, CHANGED), moved(TEXT)) == moved(CHANGED)


def test_takes_the_nearest_of_several_places():
    block = "one\ntwo\nthree\nfour\nfive\nsix\n"
    three = (block + "between\n") * 3
    changed = (block + "between\n") + block.replace("four", "4") + "between\n" + block + "between\n"
    assert apply(hunks_between(three, changed), "above\n" + three) == "above\n" + changed


def test_windows_line_ends_stay():
    changed = apply(hunks_between(TEXT, CHANGED), TEXT.replace("\n", "\r\n"))
    assert changed == CHANGED.replace("\n", "\r\n")


@pytest.mark.parametrize("gone, said", [("line 9\n", "hunk 1 of 2"), ("line 31\n", "hunk 2 of 2")])
def test_a_mismatch_names_the_hunk(gone, said):
    with pytest.raises(Mismatch, match=said):
        apply(hunks_between(TEXT, CHANGED), TEXT.replace(gone, ""))


def test_a_cut_diff_is_refused():
    diff = "--- a/file\n+++ b/file\n@@ -1,3 +1,4 @@\n one\n+new\n two\n"
    with pytest.raises(ValueError, match="not as many lines"):
        parse(diff)
