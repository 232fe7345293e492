import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.validate import teacher
from rgexport.validate.parity import compare, validate_artifacts
from rgexport.validate.report import overview_row, render_several

Clean = Callable[[str], Path]


def test_artifacts_in_one_table(
    clean: Clean, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"json_file": tmp_path / "r.json", "html_file": tmp_path / "r.html"}
    kinds = ["fp32", "int8", "int4"]
    paths = [clean(kind) for kind in kinds]
    assert validate_artifacts(paths, model=str(checkpoint), tokens=40, **files) == 0
    out = capsys.readouterr().out
    assert out.startswith("PASS  all 3 pass")
    found = json.loads(files["json_file"].read_text("utf-8"))
    assert [one["artifact"]["path"] for one in found] == list(map(str, paths))
    sizes = [one["artifact"]["bytes"] for one in found]
    costs = [one["original"]["kl"]["mean"] for one in found]
    assert sizes == sorted(sizes, reverse=True) and costs == sorted(costs)
    page = files["html_file"].read_text("utf-8")
    assert page.index("Side by side") < page.index('id="a1"') < page.index('id="a3"')


def test_each_is_what_it_is_alone(clean: Clean, checkpoint: Path) -> None:
    passes = teacher.SharedPasses()
    for kind in ("fp16", "int4"):
        alone = compare(clean(kind), model=str(checkpoint), max_tokens=30)
        shared = compare(clean(kind), model=str(checkpoint), max_tokens=30, passes=passes)
        assert shared.original == alone.original and shared.twin == alone.twin


def test_the_original_runs_once(
    clean: Clean, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []
    teach = teacher.teach

    def counted(label: str, *args: Any) -> teacher.Pass:
        runs.append(label)
        return teach(label, *args)

    monkeypatch.setattr(teacher, "teach", counted)
    passes = teacher.SharedPasses()
    for kind in ("fp32", "int4"):
        compare(clean(kind), model=str(checkpoint), max_tokens=20, passes=passes)
    assert runs == ["Running the original"]
    compare(clean("fp32"), model=str(checkpoint), max_tokens=21, passes=passes)
    assert runs == ["Running the original"] * 2, "another text is another pass"


def test_one_failure_is_exit_code_1_and_is_named(
    clean: Clean,
    spoil: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, page = spoil("fp32", config={"soft_cap": 20.0}), tmp_path / "r.html"
    assert validate_artifacts([clean("fp32"), bad], tokens=30, html_file=page) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL  1 of 2 fail")
    before, _, after = out.partition("FAILED  twin.logits is ")
    assert str(bad) in before and "float32 on both sides" in after
    assert "1 of 2 fails." in page.read_text("utf-8")


def test_a_broken_one_is_told_before_the_work(clean: Clean, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(RequestError, match="nowhere"):
        validate_artifacts([clean("fp32"), tmp_path / "nowhere"])
    assert "Running" not in capfd.readouterr().err


def test_without_an_original_its_columns_are_empty(clean: Clean) -> None:
    result = compare(clean("int8"), max_tokens=12)
    path, size, bits, *cost, verdict = overview_row(result)
    assert path == str(clean("int8")) and size.endswith("B") and float(bits) > 8
    assert cost == ["", "", ""] and verdict == "PASS"
    assert "all 2 pass" in render_several([result, result])
