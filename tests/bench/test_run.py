"""What the bench of exports asks for, and what it counts."""

import sys
from pathlib import Path

import pytest

from bench.run import request, runs, size_of


@pytest.mark.parametrize(
    ("word", "kind", "expected"),
    [
        ("int4", "onnx", ("x-int4-onnx", "onnx", "--precision", "int4")),
        ("pal4", "coreml", ("x-pal4-coreml", "coreml", "--precision", "pal4")),
        ("q4_k_m", "onnx", ("x-q4_k_m.gguf", "gguf", "--type", "q4_k_m")),
    ],
)
def test_request(word, kind, expected):
    target, *asked = request(Path("x"), word, kind)
    assert (str(target), *asked) == expected


def test_size_is_of_all_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(bytes(7))
    (tmp_path / "b").write_bytes(bytes(5))
    assert size_of(tmp_path) == 12 and size_of(tmp_path / "b") == 5


def test_packages_are_timed_on_a_mac_only():
    assert runs(Path("x-int4-onnx")) and runs(Path("x-q4_0.gguf"))
    assert runs(Path("x-int4-coreml")) == (sys.platform == "darwin")
