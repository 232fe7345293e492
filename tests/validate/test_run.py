import dataclasses
import html
import json

import pytest

from rgexport.errors import RequestError
from rgexport.validate.opening import Request
from rgexport.validate.run import validate_artifact, validate_artifacts


def test_the_report_and_the_json(clean, checkpoint, tmp_path, capsys):
    file = tmp_path / "result.json"
    request = Request(model=str(checkpoint), max_tokens=50)
    assert validate_artifacts([clean("int8")], request, json_file=file) == 0
    out, err = capsys.readouterr()
    assert out.startswith("PASS  ") and "KL, nats per token" in out
    assert "Comparing" in err and "Comparing" not in out
    found = json.loads(file.read_text())
    assert found["schema_version"] == 1 and found["verdict"] == "PASS"
    text = {"name": "random token ids", "tokens": 50, "windows": 50 / 16, "bytes": None}
    assert found["text"] == text | {"truncated": False}
    assert found["environment"]["onnxruntime"] == found["engine"]["engine_version"]


def test_ambiguous_is_exit_code_1_unless_it_is_allowed(clean, checkpoint, capsys):
    given = Request(model=str(checkpoint), max_tokens=50)
    original = validate_artifact(clean("int4"), given).original
    assert original.kl.standard_error > 0
    limits = [f"original.kl={original.kl.mean + original.kl.standard_error}"]
    assert validate_artifacts([clean("int4")], given, limits=limits) == 1
    out = capsys.readouterr().out
    assert out.startswith("AMBIGUOUS  ") and "1 of " in out and "cannot be decided" in out
    assert "AMBIGUOUS  original.kl is " in out and " ± " in out
    assert validate_artifacts([clean("int4")], given, limits=limits, allow_ambiguous=True) == 0
    below = [f"original.kl={original.kl.mean / 2}"]
    assert validate_artifacts([clean("int4")], given, limits=below, allow_ambiguous=True) == 1
    assert capsys.readouterr().out.count("FAILED  original.kl") == 1


def test_a_quality_that_a_user_asks_for(clean, checkpoint, tmp_path, capsys):
    """Correct, but not as good: exit code 1, and both verdicts are told."""
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    given = Request(model=str(checkpoint), max_tokens=50)
    assert validate_artifacts([clean("int4")], given, json_file=file, html_file=page) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(file.read_text())
    grade = found["quality"]["grade"]
    assert grade in ("fair", "poor") and found["min_quality"] is None
    assert found["quality"]["kl"] == found["original"]["kl"]["mean"]
    assert found["quality"]["top1"] == found["original"]["agreement"]["top1"]
    assert shown[0].startswith("PASS  ") and shown[1].startswith(f"{grade.upper()}  quality")
    assert shown[2] == found["quality"]["meaning"]
    text = page.read_text("utf-8")
    assert f"quality: {grade}" in text and shown[2] in html.unescape(text)

    asked = dataclasses.replace(given, min_quality="good")
    assert validate_artifacts([clean("int4")], asked, json_file=file, html_file=page) == 1
    told = "The quality is below good, which was asked for."
    out = capsys.readouterr().out
    assert out.startswith("PASS  ") and told in out and told in page.read_text("utf-8")
    assert json.loads(file.read_text())["min_quality"] == "good"
    assert validate_artifacts([clean("fp32")], asked) == 0
    assert "LOSSLESS  quality" in capsys.readouterr().out
    assert validate_artifacts([clean("fp32"), clean("int4")], asked) == 1
    out = capsys.readouterr().out
    assert out.startswith("PASS  all 2 pass") and f"{clean('int4')}: {told}" in out


def test_a_quality_needs_an_original(clean):
    with pytest.raises(RequestError, match=r"--min-quality good: the original .* was not given"):
        validate_artifacts([clean("fp32")], Request(max_tokens=8, min_quality="good"))


def test_a_limit_that_a_user_sets(clean, capsys):
    assert (
        validate_artifacts([clean("int8")], Request(max_tokens=30), limits=["twin.logits=1e-9"])
        == 1
    )
    assert "(asked for: activations are rounded" in capsys.readouterr().out
    with pytest.raises(RequestError, match="expected NAME=VALUE"):
        validate_artifacts([clean("int8")], limits=["kl=3"])
