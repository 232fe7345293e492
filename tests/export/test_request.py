"""What users ask for, and what they are told to do next."""

import dataclasses
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.checked import NOT_ASKED_FOR, CheckRecord, skipped
from rgexport.export.request import (
    algorithm_word,
    as_argument,
    check_line,
    closing_line,
    default_target,
    precision_word,
)
from rgexport.files.hashing import FileRecord
from tests.command_line import ROOT, rgexport


def test_precision():
    assert precision_word(None, False, False, "onnx") is None
    assert precision_word("int4", True, False, "onnx") == "int4"
    assert precision_word(None, False, True, "onnx") == "int8"
    assert precision_word("pal4", False, False, "coreml") == "pal4"
    with pytest.raises(RequestError, match=r"'pal4'; expected one of fp32, fp16, int8, int4$"):
        precision_word("pal4", False, False, "onnx")
    target = default_target("recurrentgemma-2b", "int8", "onnx", "wasm")
    assert target == Path("recurrentgemma-2b-int8-onnx-wasm")


@pytest.mark.parametrize(
    ("quality", "calibration", "plan", "word"),
    [
        (None, None, None, None),
        ("fast", None, None, "rtn"),
        ("default", None, "plan", "search"),
        ("best", None, None, "gptq"),
        ("best", "file", "plan", "gptq"),
        (None, "file", None, "gptq"),
        (None, None, "plan", None),
        (None, "file", "plan", None),
    ],
)
def test_what_chooses_levels(quality, calibration, plan, word):
    assert algorithm_word(quality, calibration, plan) == word


def test_a_calibration_is_for_the_best_quality():
    with pytest.raises(
        RequestError, match=r"--quality fast takes no calibration; .* --quality best"
    ):
        algorithm_word("fast", "file", None)
    with pytest.raises(RequestError, match="--quality is 'better'; expected one of fast, default"):
        algorithm_word("better", None, None)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("onnx", "--precision", "fp32"), "fp32"),
        (("onnx", "--precision", "fp16"), "fp16"),
        (("coreml", "--precision", "fp16", "--embedding-precision", "fp16"), "fp16"),
        (("gguf", "--type", "f16"), "f16"),
    ],
)
def test_weights_without_levels_have_no_quality(command, word, tmp_path):
    if command[0] == "coreml":
        pytest.importorskip("coremltools")
    for quality in ("fast", "default", "best"):
        target = tmp_path / "out"
        asked = [*command, "--size", "demo", "--quality", quality, "-o", target]
        run = rgexport(*asked, folder=ROOT)
        assert run.returncode == 2
        assert f"--quality (or --calibration) changes nothing in {word} weights" in run.stderr
        assert run.stderr.count("\n") == 1 and not target.exists()


CHECKED = CheckRecord(
    **{"status": "verified", "tokens": 130, "positions": 3, "kl": 0.01234, "engine": "toy 1"},
    **{"kl_standard_error": 0.00123, "relative_max": 0.004},
)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (NOT_ASKED_FOR, None),
        # A manifest may be from anybody: its texts are shown on one line.
        (skipped("a\x1bb\nc"), "Not checked: a\\u001bb\\nc. Do it later: rgexport validate out"),
        (
            CheckRecord(status="unverified", reason="so"),
            "Checked: unverified, since so. Look closer: rgexport validate out",
        ),
        (
            CHECKED,
            "Checked on 130 tokens (3 compared) in toy 1: KL to the original 0.0123 ± 0.001 nats; "
            "largest difference to the dequantized reference 0.4 % of the largest logit: verified.",
        ),
    ],
)
def test_check_line(made, found, line):
    assert check_line(Artifact(Path("out"), made.manifest.with_check(found))) == line


TOKENIZER = {"tokenizer.model": FileRecord("0" * 64, 1)}


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({}, "It has no tokenizer; try: rgexport generate out --ids 2"),
        ({"files": TOKENIZER, "instruction_tuned": True}, "Chat with it: rgexport chat out"),
        ({"files": TOKENIZER}, 'Try: rgexport generate out -p "The meaning of life is"'),
        (
            {"kind": "coreml"},
            "It runs on iOS 18 and macOS 15: what ends in .mlpackage goes into an Xcode "
            "project. It has no tokenizer; try: rgexport generate out --ids 2",
        ),
        (
            {"files": TOKENIZER, "name": "recurrentgemma-9b"},
            '-p "The meaning of life is" (a base model; to chat, export --size 9b-it)',
        ),
    ],
)
def test_closing_line(made, change, advice):
    manifest = dataclasses.replace(made.manifest, **change)
    line = closing_line(Artifact(Path("out"), manifest))
    assert line.startswith("out is complete (") and line.endswith(advice)


@pytest.mark.parametrize(
    ("path", "typed"),
    [("out", "out"), ("/a b/c", "'/a b/c'"), ("-my out", "'./-my out'"), ("$HOME", "'$HOME'")],
)
def test_paths_can_be_pasted(made, path, typed):
    assert as_argument(Path(path)) == typed
    line = closing_line(Artifact(Path(path), made.manifest))
    assert line.endswith(f"rgexport generate {typed} --ids 2")
