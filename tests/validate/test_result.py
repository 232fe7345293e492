import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest

from rgexport import progress
from rgexport.errors import RequestError
from rgexport.validate.opening import Request
from rgexport.validate.report.terminal import render
from rgexport.validate.result import Result, require_writable, write_json
from rgexport.validate.run import validate_artifact


@pytest.fixture(scope="module")
def result(clean, checkpoint) -> Result:
    return validate_artifact(clean("int4"), Request(model=str(checkpoint), max_tokens=40))


def with_nan(result: Result) -> Result:
    logits = dataclasses.replace(result.twin.logits, max=math.nan, relative_max=math.inf)
    first = dataclasses.replace(result.checks[0], value=math.nan)
    return dataclasses.replace(
        result,
        twin=dataclasses.replace(result.twin, logits=logits),
        checks=[first, *result.checks[1:]],
    )


def test_checks_have_the_values_that_were_measured(result):
    found = {check.name: check.value for check in result.checks}
    assert found["twin.logits"] == result.twin.logits.relative_max > 0
    assert found["twin.rms"] == result.twin.logits.relative_rms > 0
    assert found["original.rms"] == result.original.logits.relative_rms > 0


def test_json_is_strict_json(result, tmp_path):
    file = tmp_path / "r.json"
    write_json([with_nan(result)], file)

    def refuse(word: str) -> None:
        raise ValueError(word)

    found = json.loads(file.read_text("utf-8"), parse_constant=refuse)
    assert found["verdict"] == "FAIL"
    assert found["twin"]["logits"]["max"] is None
    assert found["checks"][0] | {"reason": ""} == {
        "name": "twin.logits",
        "value": None,
        "limit": result.checks[0].limit,
        "reason": "",
        "margin": 0.0,
        "kind": "",
        "outcome": "FAIL",
        "passed": False,
    }


def test_the_report_is_plain_text_of_limited_width(result, monkeypatch):
    monkeypatch.setattr(progress, "verbose", True)
    text = render(result)
    assert "\x1b" not in text
    table = [line for line in text.splitlines() if "   " in line]
    assert max(map(len, table)) <= 100
    for part in ("KL 99th percentile", "worst state", "rglru", "projection", "stored unchanged"):
        assert part in text.replace("rg_lru", "rglru")


def test_the_report_fits_a_screen(result, tmp_path, monkeypatch):
    lines = render(result).splitlines()
    assert len(lines) <= 20
    assert lines[0].startswith("PASS  ") and lines[0].endswith("every check passed")
    assert lines[-1] == "All numbers: -v, or --html FILE for a page."
    assert render(result, tmp_path / "r.html").endswith(f"a page: {tmp_path / 'r.html'}\n")
    cells = next(line.split() for line in lines if line.startswith("top-1 agreement"))
    shares = [100 * side.agreement.top1 for side in (result.original, result.twin) if side]
    assert [float(cell) for cell in cells[2::2]] == pytest.approx(shares, abs=0.006)
    failed = with_nan(result)
    first, *_, last = lines = render(failed).splitlines()
    assert first.startswith("FAIL  ") and f"1 of {len(result.checks)} checks failed" in first
    assert any(line.startswith("FAILED  twin.logits is nan") for line in lines)
    assert f"rgexport validate {failed.artifact.path} --bisect" in last and len(lines) <= 21
    monkeypatch.setattr(progress, "verbose", True)
    assert len(render(result).splitlines()) > 40


@pytest.mark.parametrize("columns", [30, 40, 80])
def test_on_a_narrow_terminal_no_number_is_cut(result, columns, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    short = dataclasses.replace(result.artifact, path="artifact")
    source = dataclasses.replace(result.source, path="original")
    shown = render(dataclasses.replace(result, artifact=short, source=source))
    assert all(len(line.rstrip()) <= columns for line in shown.splitlines())
    for side in (result.original, result.twin):
        assert f"{side.kl.mean:.3g} ± " in shown


def test_the_size_and_the_bits_are_those_of_the_files(result, clean, checkpoint):
    files = [file for file in clean("int4").iterdir() if file.name != "rgexport.json"]
    assert result.artifact.bytes == sum(file.stat().st_size for file in files)
    assert 4.5 < result.artifact.matrix_bits_per_weight < result.artifact.bits_per_weight < 10
    assert validate_artifact(clean("fp32"), Request(max_tokens=8)).artifact.bits_per_weight == 32


def test_the_report_says_when_there_was_no_original(result):
    source = dataclasses.replace(result.source, found=False, path=None)
    text = render(dataclasses.replace(result, source=source, original=None, weights=None))
    assert "not given (-m), so the cost is not measured" in text
    assert "projection" not in text


def test_a_report_damages_no_artifact_and_names_a_full_disk(clean, tmp_path, result):
    require_writable(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
    with pytest.raises(RequestError, match="it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(RequestError, match="cannot write /dev/full: No space left"):
        write_json([result], Path("/dev/full"))
    (tmp_path / "link").symlink_to(clean("int4"))
    for file in (clean("int4") / "rgexport.json", tmp_path / "link" / "new.json"):
        with pytest.raises(RequestError, match="it lies in an artifact; choose another place"):
            require_writable(file)


@pytest.mark.skipif(sys.platform != "linux", reason="names must be Unicode elsewhere")
def test_json_of_a_path_that_is_not_unicode(result, tmp_path):
    path = os.fsdecode(b"mod\xe8le")
    renamed = dataclasses.replace(result.artifact, path=path)
    write_json([dataclasses.replace(result, artifact=renamed)], tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["artifact"]["path"] == path
