"""`validate` of one artifact and of several: what is compared, what is said, and exit codes."""

import dataclasses
import html
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from rgexport.artifacts.manifest_reader import read_manifest
from rgexport.errors import RequestError
from rgexport.griffin import checkpoint as checkpoints
from rgexport.griffin.layout import model_tensors
from rgexport.validate import reference_pass, source
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.run import validate_artifact, validate_artifacts
from rgexport.validate.source import find_original
from tests.deepmind import write_deepmind
from tests.models import random_weights
from tests.validate.conftest import CONFIG

COSTS = {"fp32": 0, "fp16": 1e-9, "int8": 1e-5, "int4": 1e-2, "int4-exact": 1e-2}
"""Kind → the least KL that it costs; the next kind's is the most."""


@pytest.mark.parametrize("kind", COSTS)
def test_clean_artifacts_pass(clean, checkpoint, kind):
    result = validate_artifact(clean(kind), ValidationRequest(model=str(checkpoint)))
    assert result.verdict == "PASS", [check for check in result.checks if not check.passed]
    assert result.source.found and result.source.same_files
    assert result.text.windows > 4
    assert list(dict.fromkeys(error.name for error in result.weights)) == list(
        model_tensors(CONFIG)
    )
    assert result.original.kl.mean >= 0.9 * result.dequantized.kl.mean
    least, most = COSTS[kind], min((c for c in COSTS.values() if c > COSTS[kind]), default=1)
    assert least <= result.original.kl.mean < most


def test_ambiguous_is_exit_code_1_unless_it_is_allowed(clean, checkpoint, capsys):
    request = ValidationRequest(model=str(checkpoint), max_tokens=50)
    original = validate_artifact(clean("int4"), request).original
    assert original.kl.standard_error > 0
    limits = {"original.kl": original.kl.mean + original.kl.standard_error}
    asked = dataclasses.replace(request, limits=limits)
    assert validate_artifacts([clean("int4")], asked) == 1
    out = capsys.readouterr().out
    assert out.startswith("AMBIGUOUS  ") and "1 of " in out and "cannot be decided" in out
    assert "AMBIGUOUS  original.kl is " in out and " ± " in out
    assert validate_artifacts([clean("int4")], asked, allow_ambiguous=True) == 0
    below = dataclasses.replace(request, limits={"original.kl": original.kl.mean / 2})
    assert validate_artifacts([clean("int4")], below, allow_ambiguous=True) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED  original.kl is") == 1 and "(asked for: " in out


def test_a_quality_that_a_user_asks_for(clean, checkpoint, tmp_path, capsys):
    """Correct, but not as good: exit code 1, and both verdicts are told."""
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    request = ValidationRequest(model=str(checkpoint), max_tokens=50)
    assert validate_artifacts([clean("int4")], request, json_file=file, html_file=page) == 0
    shown, messages = capsys.readouterr()
    first, second, third = shown.splitlines()[:3]
    assert "Comparing" in messages and "Comparing" not in shown
    written = json.loads(file.read_text())
    assert written["schema_version"] == 2 and written["verdict"] == "PASS"
    assert written["twin"] == written["dequantized"], "its former name"
    assert written["text"]["tokens"] == 50 and written["text"]["bytes"] is None
    grade = written["quality"]["grade"]
    assert grade in ("fair", "poor") and written["min_quality"] is None
    assert written["quality"]["kl"] == written["original"]["kl"]["mean"]
    assert written["quality"]["top1"] == written["original"]["agreement"]["top1"]
    assert first.startswith("PASS  ") and second.startswith(f"{grade.upper()}  quality")
    assert third == written["quality"]["meaning"]
    assert f"quality: {grade}" in page.read_text("utf-8")
    assert third in html.unescape(page.read_text("utf-8"))

    asked = dataclasses.replace(request, min_quality="good")
    assert validate_artifacts([clean("fp32"), clean("int4")], asked, html_file=page) == 1
    told = "The quality is below good, which was asked for."
    out = capsys.readouterr().out
    assert out.startswith("PASS  2 artifacts: 2 PASS") and f"{clean('int4')}: {told}" in out
    assert page.read_text("utf-8").count(told) == 1
    with pytest.raises(RequestError, match=r"--min-quality good: the original .* was not given"):
        validate_artifacts([clean("fp32")], ValidationRequest(max_tokens=8, min_quality="good"))


def test_artifacts_in_one_table(clean, checkpoint, tmp_path, capsys, monkeypatch):
    """The original runs once for all of them."""
    runs: list[str] = []
    run_reference = reference_pass.run_reference

    def counted(label, *args, **options):
        runs.append(label)
        return run_reference(label, *args, **options)

    monkeypatch.setattr(reference_pass, "run_reference", counted)
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    paths = [clean(kind) for kind in ("fp32", "int4")]
    request = ValidationRequest(model=str(checkpoint), max_tokens=40)
    assert validate_artifacts(paths, request, json_file=file, html_file=page) == 0
    assert runs == ["Running the original"]
    out = capsys.readouterr().out
    assert out.startswith("PASS  2 artifacts: 2 PASS")
    written = json.loads(file.read_text("utf-8"))
    larger, smaller = written
    assert larger["original"]["kl"]["mean"] < smaller["original"]["kl"]["mean"]
    text = page.read_text("utf-8")
    assert text.index("Side by side") < text.index('id="a1"') < text.index('id="a2"')

    runs.clear()
    passes = reference_pass.SharedPasses()
    for tokens in (8, 8, 9):
        asked = ValidationRequest(model=str(checkpoint), max_tokens=tokens)
        validate_artifact(paths[0], asked, passes)
    assert runs == ["Running the original"] * 2, "another text is another pass"


def test_one_failure_is_exit_code_1_and_is_named(clean, spoil, tmp_path, capsys, monkeypatch):
    bad, page = spoil("fp32", config={"soft_cap": 20.0}), tmp_path / "r.html"
    request = ValidationRequest(max_tokens=30)
    assert validate_artifacts([clean("fp32"), bad], request, html_file=page) == 1
    before, _, after = capsys.readouterr().out.partition("FAILED  dequantized.logits is ")
    assert before.startswith("FAIL  2 artifacts: 1 FAIL, 1 PASS") and str(bad) in before
    assert "float32 on both sides" in after and "1 FAIL, 1 PASS" in page.read_text("utf-8")
    with monkeypatch.context() as patch, pytest.raises(RequestError, match="No space left"):
        patch.setattr("rgexport.files.atomic.move", Mock(side_effect=OSError(28, "No space left")))
        validate_artifacts([bad], request, html_file=tmp_path / "full.html")
    assert capsys.readouterr().out.startswith("FAIL") and not [*tmp_path.glob("*full*")]


@pytest.fixture
def manifest(clean):
    return read_manifest(clean("fp32"))


def named(manifest, name):
    return dataclasses.replace(manifest, source=dataclasses.replace(manifest.source, name=name))


def test_a_deepmind_file_takes_window_and_soft_cap_from_the_artifact(manifest, tmp_path):
    config = dataclasses.replace(manifest.config, window=24, soft_cap=5.0)
    file = write_deepmind(random_weights(config), tmp_path)
    original = find_original(dataclasses.replace(manifest, config=config), str(file))
    assert original.config_differences == ()


def test_the_demo_and_released_models_are_found(manifest, checkpoint, tmp_path, monkeypatch):
    """A demo that was trained anew is not taken for the original."""
    monkeypatch.setattr(checkpoints, "demo_folder", lambda: checkpoint)
    assert find_original(named(manifest, "demo"), None).same_files
    assert find_original(manifest, None) is None
    other = Path(shutil.copytree(checkpoint, tmp_path / "demo"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(checkpoints, "demo_folder", lambda: other)
    assert find_original(named(manifest, "demo"), None) is None
    assert not find_original(manifest, str(other)).same_files

    cache = {"google/recurrentgemma-2b-it": checkpoint}
    monkeypatch.setattr(source, "cached_model", cache.get)
    assert find_original(named(manifest, "recurrentgemma-2b-it"), None).same_files
    assert find_original(named(manifest, "recurrentgemma-9b"), None) is None
