"""Commands in a pseudo-terminal, and the picture of what they show."""

import pytest

pyte = pytest.importorskip("pyte")
pytest.importorskip("playwright")

from rich.text import Text  # noqa: E402

from bench.pictures import terminal_svg  # noqa: E402
from bench.terminal import Scene, line_of, play  # noqa: E402


def screen(output: str) -> pyte.Screen:
    found = pyte.Screen(20, 3)
    pyte.Stream(found).feed(output)
    return found


def test_line_has_its_colours_and_no_spaces_at_its_end():
    line = line_of(screen("a \x1b[1;32mgreen\x1b[0m b"), 0)
    assert line.plain == "a green b"
    spans = [(line.plain[s.start : s.end], str(s.style)) for s in line.spans]
    assert ("green", "bold not reverse green") in [(text.strip(), style) for text, style in spans]


def test_what_was_overwritten_is_not_shown():
    assert line_of(screen("10 %\r100 %"), 0).plain == "100 %"


def test_scene_is_what_a_user_sees(tmp_path):
    lines = [line.plain for line in play(Scene(("--version",)), tmp_path, 80)]
    assert lines[0] == "$ rgexport --version" and "rgexport" in lines[1]
    assert "native kernels" in lines[2] and "library of levels" in lines[3] and lines[4:] == [""]


def test_failure_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="rgexport inspect nothing ended with exit code 2"):
        list(play(Scene(("inspect", "nothing")), tmp_path, 80))


def test_picture_needs_no_network():
    svg = terminal_svg([Text("rgexport onnx")], "terminal")
    assert "rgexport&#160;onnx" in svg and svg.count("http") == 1  # the name of the format
