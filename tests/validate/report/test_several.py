import dataclasses
import json
from typing import Any

from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate import reference_pass
from rgexport.validate.opening import Request
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.report.page import render_page
from rgexport.validate.report.result_tables import overview
from rgexport.validate.report.terminal import render, render_several
from rgexport.validate.run import validate_artifact, validate_artifacts
from rgexport.validate.speed import Speed


def test_artifacts_in_one_table(clean, checkpoint, tmp_path, capsys):
    files: dict[str, Any] = {"json_file": tmp_path / "r.json", "html_file": tmp_path / "r.html"}
    kinds = ["fp32", "int8", "int4"]
    paths = [clean(kind) for kind in kinds]
    assert validate_artifacts(paths, Request(model=str(checkpoint), max_tokens=40), **files) == 0
    out = capsys.readouterr().out
    assert out.startswith("PASS  all 3 pass")
    found = json.loads(files["json_file"].read_text("utf-8"))
    assert [one["artifact"]["path"] for one in found] == list(map(str, paths))
    sizes = [one["artifact"]["bytes"] for one in found]
    costs = [one["original"]["kl"]["mean"] for one in found]
    assert sizes == sorted(sizes, reverse=True) and costs == sorted(costs)
    page = files["html_file"].read_text("utf-8")
    assert page.index("Side by side") < page.index('id="a1"') < page.index('id="a3"')


def test_the_original_runs_once_and_the_results_are_the_same(clean, checkpoint, monkeypatch):
    runs: list[str] = []
    run_reference = reference_pass.run_reference

    def counted(label: str, *args: Any) -> reference_pass.Pass:
        runs.append(label)
        return run_reference(label, *args)

    request, passes = Request(model=str(checkpoint), max_tokens=20), reference_pass.SharedPasses()
    alone = validate_artifact(clean("int4"), request)
    monkeypatch.setattr(reference_pass, "run_reference", counted)
    shared = [validate_artifact(clean(kind), request, passes) for kind in ("fp32", "int4")][1]
    assert shared.original == alone.original and shared.twin == alone.twin
    assert runs == ["Running the original"]
    longer = dataclasses.replace(request, max_tokens=21)
    validate_artifact(clean("fp32"), longer, passes)
    assert runs == ["Running the original"] * 2, "another text is another pass"


def test_one_failure_is_exit_code_1_and_is_named(clean, spoil, tmp_path, capsys):
    bad, page = spoil("fp32", config={"soft_cap": 20.0}), tmp_path / "r.html"
    assert validate_artifacts([clean("fp32"), bad], Request(max_tokens=30), html_file=page) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL  1 of 2 fail")
    before, _, after = out.partition("FAILED  twin.logits is ")
    assert str(bad) in before and "float32 on both sides" in after
    assert "1 of 2 fails." in page.read_text("utf-8")


def test_speeds_have_columns_if_they_were_measured(clean):
    slow = validate_artifact(clean("int8"), Request(max_tokens=12))
    path, size, bits, *cost, verdict = next(iter(overview([slow]).rows))
    assert path == str(clean("int8")) and size.endswith("B") and float(bits) > 8
    assert cost == ["", "", ""] and verdict == "PASS", "there is no original"
    assert not [name for name in overview([slow]).header if "tokens/s" in name]
    fast = dataclasses.replace(slow, speed=Speed(decode=81.5, prefill=950.0, prompt_tokens=128))
    table = overview([slow, fast])
    assert table.header[-3:] == ("tokens/s", "prompt/s", "verdict")
    assert [row[-3:-1] for row in table.rows] == [("", ""), ("81.5", "950")]
    assert "prompt/s" in render_several([slow, fast])
    assert "81.5 tokens/s one by one, 950 of a prompt of 128" in render(fast)
    page = render_page([slow, fast])
    assert '<th scope="col" class="n">prompt/s</th>' in page
    assert '<td class="n">–</td><td class="n">–</td></tr>' in page


def test_where_there_is_no_original_a_reference_file_tells_the_cost(clean, checkpoint, tmp_path):
    file = capture(open_checkpoint(checkpoint), tmp_path / "r", device="cpu")
    result = validate_artifact(
        clean("int8"), Request(max_tokens=12, reference=read_reference(file))
    )
    assert result.original is None and result.reference is not None
    row = dict(zip(overview([result]).header, next(iter(overview([result]).rows)), strict=True))
    kl = result.reference.kl
    assert row["KL to original"] == f"{kl.mean:.3g} ± {kl.standard_error:.1g}"
    assert row["top-1"].endswith(" %")
