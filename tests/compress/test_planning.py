"""Plans of the demo: what they promise, and what exports make of them."""

import json
from dataclasses import replace

import pytest

from rgexport.cli import run
from rgexport.compress.calibrate import CalibrationOptions, calibrate
from rgexport.compress.layouts import layouts_of
from rgexport.compress.plan_file import is_plan
from rgexport.compress.planning import Planner, Target
from rgexport.compress.quantize import PlanOptions, make_plan, page_of
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import QUANTIZABLE, model_tensors
from rgexport.quantize.calibration import open_calibration
from rgexport.quantize.plan import bfloat16_gates, load_plan
from rgexport.quantize.scheme import BFLOAT16, Mixed

FEW = replace(
    layouts_of("onnx"),
    schemes=tuple(
        one for one in layouts_of("onnx").schemes if one.label in ("int4/128", "int4/32", "int8/32")
    ),
)
"""Three layouts take less than half of the time of all."""


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(size="demo")


@pytest.fixture(scope="module")
def calibration(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "demo.calibration"
    calibrate(checkpoint, CalibrationOptions(tokens=1024, gradient_tokens=512), path)
    return path


@pytest.fixture(scope="module")
def planner(checkpoint, calibration):
    return Planner(checkpoint, open_calibration(calibration), FEW)


@pytest.fixture(scope="module")
def text(calibration):
    return open_calibration(calibration).sequences


def matrix_bytes(plan, config):
    """By hand: bits of levels, and a float16 for each block."""
    total, weights = 0.0, 0
    for name, spec in model_tensors(config).items():
        if spec.role not in QUANTIZABLE:
            continue
        rows, columns = spec.shape
        weights += rows * columns
        groups = plan[name].groups if isinstance(plan[name], Mixed) else ()
        left = rows
        for group in groups[:-1]:
            ranges = [part.split("-") for part in group.rows.split(",")]
            count = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
            total += count * columns * (group.scheme.bits + 16 / group.scheme.block) / 8
            left -= count
        scheme = groups[-1].scheme if groups else plan[name]
        total += left * columns * (scheme.bits + 16 / scheme.block) / 8
    return total, weights


@pytest.mark.full
def test_bits_are_kept_and_the_prediction_is_near(planner, checkpoint, text):
    found = planner.find(Target("bits", 4.6), text)
    total, weights = matrix_bytes(found.plan, checkpoint.config)
    assert 4.59 < 8 * total / weights <= 4.6
    assert found.chosen.bits == pytest.approx(8 * total / weights, rel=1e-6)
    assert isinstance(found.plan["embed_tokens.weight"], Mixed)
    gates = bfloat16_gates(checkpoint.config, checkpoint.weights)
    assert gates and {found.plan[name] for name in gates} == {BFLOAT16}
    assert not layouts_of("coreml").bfloat16_gates and not layouts_of("gguf").bfloat16_gates
    bits, losses = zip(*((point.bits, point.kl) for point in found.front), strict=True)
    assert list(bits) == sorted(bits) and list(losses) == sorted(losses, reverse=True)
    assert found.front[0].bits == pytest.approx(4.125)
    assert found.front[-1].bits == pytest.approx(8.5)


@pytest.mark.full
def test_a_quality_is_reached(planner, text):
    found = planner.find(Target("kl", 0.005), text)
    assert found.measured.kl == pytest.approx(0.005, rel=0.1)
    assert found.measured.tokens == sum(map(len, text))


@pytest.mark.full
def test_a_size_is_kept(planner, text, checkpoint):
    found = planner.find(Target("size", 8_500_000), text[:1])
    assert 0.99 * 8_500_000 < found.chosen.size <= 8_500_000
    assert FEW.artifact_bytes(found.plan, checkpoint) == found.chosen.size


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            Target("kl", 1e-7),
            r"--target-kl is 1e-07, which no plan reaches; expected .*e-05 or more",
        ),
        (Target("size", 1e6), "--target-size is 1.00 MB, .* expected 7.* MB or more"),
        (Target("bits", 3), "--bits is 3, .* expected 4.125 or more"),
    ],
)
def test_what_cannot_be_reached_is_refused(planner, text, target, words):
    with pytest.raises(RequestError, match=words):
        planner.find(target, text[:1])


def test_the_file_is_a_plan_for_exports(checkpoint, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("rgexport.compress.quantize.layouts_of", lambda kind: FEW)
    target = tmp_path / "demo.plan.json"
    options = PlanOptions(calibration=calibration, bits=4.5, tokens=64)
    report = make_plan(checkpoint, options, target)
    fields = json.loads(target.read_text())
    assert load_plan(target, checkpoint.config) == report.found.plan
    assert fields["target"] == {"bits": 4.5} and fields["text"]["tokens"] == 64
    assert fields["measured_kl"] > 0 and fields["predicted_kl"] > 0
    assert fields["standard_error"] is None  # of a single sequence
    assert [point["bits"] for point in fields["front"]] == sorted(
        point["bits"] for point in fields["front"]
    )
    page = page_of(target).read_text()
    assert "<svg" in page and "What bits cost" in page and "://" not in page
    text = report.as_text()
    assert "down_proj" in text and "4.125" in text and "from 1.3 times" in text
    with pytest.raises(RequestError, match="--force"):
        make_plan(checkpoint, options, target)
    page_of(tmp_path / "other.json").write_text("mine")
    with pytest.raises(RequestError, match="--force"):
        make_plan(checkpoint, options, tmp_path / "other.json")
    with pytest.raises(RequestError, match="a plan is JSON"):
        make_plan(checkpoint, options, tmp_path / "plan.html")


def test_numbers_in_names_are_no_endings(tmp_path):
    pages = {page_of(tmp_path / name).name for name in ("plan-4.25", "plan-4.5", "plan.json")}
    assert pages == {"plan-4.25.html", "plan-4.5.html", "plan.json.html"}


def test_only_plans_are_replaced(tmp_path):
    for content, expected in (('{"plan": {}}', True), ('{"a": 1}', False), ("[]", False)):
        (tmp_path / "file").write_text(content)
        assert is_plan(tmp_path / "file") == expected
    (tmp_path / "file").write_bytes(b"\xff\x00")
    assert not is_plan(tmp_path / "file") and not is_plan(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "0 targets are given; expected one of --target-kl, --target-size and --bits"),
        (("--bits", "4", "--target-kl", "1"), "2 targets are given"),
        (("--bits", "-4"), "--bits is -4; expected a positive number"),
        (("--target-kl", "nan"), "--target-kl is nan; expected a positive number"),
        (("--target-size", "big"), "--target-size is 'big'; expected a number of bytes, such as"),
        (("--bits", "4", "--format", "pt"), "--format is 'pt'; expected one of onnx"),
        (("--bits", "4", "--tokens", "0"), "--tokens is 0; expected at least 1"),
        (("--bits", "4"), "cannot read the calibration nothing: there is no such file"),
    ],
)
def test_wrong_requests_end_in_one_line(arguments, words, capsys):
    assert run(["quantize", "--size", "demo", "--calibration", "nothing", *arguments]) == 2
    found = capsys.readouterr().err
    assert words in found and found.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5GB", 1.5e9), ("800 MB", 8e8), ("12k", 12e3), ("1000", 1e3), ("2g", 2e9)],
)
def test_sizes_are_read(text, size, tmp_path):
    options = PlanOptions(calibration=tmp_path, target_size=text)
    assert options.target == Target("size", size)
