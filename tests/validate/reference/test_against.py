import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import State
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate import opening
from rgexport.validate.checks import TENSOR_CHECKS, Check
from rgexport.validate.metrics import agreement, compare_logits
from rgexport.validate.opening import Request
from rgexport.validate.reference import against, kept_logits
from rgexport.validate.reference.against import (
    AgainstFile,
    LayerError,
    compare_with_file,
    file_checks,
    positions_to_look_at,
    with_layers,
)
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.run import validate_artifacts
from rgexport.validate.weights.weight_limits import sketch_checks
from tests.models import random_weights, write_hugging_face
from tests.validate.conftest import CONFIG

LIMITS = {"full": 10**9, "16": 120_000, "8": 90_000, "0": 20_000}
"""How the positions are stored → bytes that they may take."""


@pytest.fixture(scope="module", params=LIMITS)
def reference(request, checkpoint, tmp_path_factory) -> ReferenceFile:
    """A file of the small model; in all of them but one only few positions are full."""
    target = tmp_path_factory.mktemp("reference") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_logits, "LOGITS_BYTES", LIMITS[request.param])
        patch.setattr(kept_logits, "FULL", 16)
        patch.setattr(kept_logits, "LEAST_MOST", 40)
        capture(open_checkpoint(checkpoint), target, device="cpu")
    found = read_reference(target)
    assert found.header.tail_bits == int(request.param.replace("full", "0"))
    return found


@pytest.fixture(scope="module")
def file(checkpoint, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("reference") / "r"
    return capture(open_checkpoint(checkpoint), target, device="cpu")


def held(artifact: Path, reference: ReferenceFile) -> AgainstFile:
    opened = open_artifact(artifact)
    return compare_with_file(OrtSession(opened), opened, reference)


def failed(artifact: Path, reference: ReferenceFile) -> list[str]:
    found = held(artifact, reference)
    checks = file_checks(found, open_artifact(artifact).manifest)
    return [check.name for check in checks if not check.passed and check.kind not in TENSOR_CHECKS]


def wrong_tensors(artifact: Path, reference: ReferenceFile) -> set[str]:
    """Those whose weights are not what the reference's sketches say."""
    checks = sketch_checks(held(artifact, reference).weights)
    names = {check.name for check in checks if not check.passed}
    return {name.removeprefix("reference.").rpartition(".")[0] for name in names}


@pytest.mark.parametrize("kind", ["int4-exact", "fp16"])
def test_it_equals_a_comparison_of_all_logits(clean, checkpoint, reference, kind):
    original = open_checkpoint(checkpoint)
    model = Reference(original.config, original.weights)
    session, rows = OrtSession(open_artifact(clean(kind))), []
    for _, prompt, span in reference.spans():
        tokens = reference.tokens[span]
        hidden, _ = model.run(tokens[None])
        session.reset()
        ours = session.prefill(tokens[None], prompt.tokens)[0]
        rows.append(compare_logits(model.logits(hidden)[0], ours, np.append(tokens[1:], -1)))
    found, all_rows = held(clean(kind), reference), np.concatenate(rows)
    kl = all_rows["kl"].mean()
    assert found.kl_low.mean * 0.9999 <= kl <= found.kl_high.mean * 1.0001
    if found.full_positions == found.positions:
        assert found.kl.mean == pytest.approx(kl, rel=1e-4)
        assert found.kl_low == found.kl == found.kl_high
    elif reference.header.tail_bits == 16:
        assert found.kl.mean == pytest.approx(kl, rel=1e-4 if kind == "int4-exact" else 1e-3)
        assert kind == "fp16" or found.kl_width < 2e-3
    assert (found.kl_full == found.kl) is (found.full_positions == found.positions)
    assert reference.is_full(found.kl_full.worst_position)
    assert reference.is_full(found.logits.worst_position)
    assert 0.2 * kl < found.kl_full.mean < 5 * kl and found.kl_full.standard_error > 0
    expected = agreement(all_rows)
    assert found.agreement.top1 == pytest.approx(expected.top1, abs=1e-9)
    assert found.agreement.top5 == pytest.approx(expected.top5, abs=1e-9)
    known = all_rows[all_rows["has_next"]]
    assert found.likelihood.tokens == len(known)
    assert found.likelihood.nll == pytest.approx(known["nll"].mean(), rel=1e-5)
    delta = (known["nll_candidate"] - known["nll"]).mean()
    assert found.likelihood.delta == pytest.approx(delta, abs=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int4"])
def test_clean_artifacts_pass(clean, reference, kind):
    assert failed(clean(kind), reference) == []
    found = held(clean(kind), reference)
    assert found.same_files and found.config_differences == ()
    assert sum(prompt.tokens for prompt in found.prompts) == found.positions
    assert found.kl_low.mean <= found.kl.mean <= found.kl_high.mean


def test_states_are_compared_at_the_end_and_on_the_way(clean, reference):
    exact, rough = (held(clean(kind), reference) for kind in ("fp32", "int4"))
    longest = max(reference.header.prompts, key=lambda prompt: prompt.tokens)
    assert [drift.position for drift in exact.drift] == list(longest.checkpoints) != []
    recurrent = {"layers.0.rg_lru", "layers.0.conv1d", "layers.1.rg_lru", "layers.1.conv1d"}
    assert all({error.name for error in drift.states} == recurrent for drift in exact.drift)
    assert {error.name for error in exact.states} == {error.name for error in rough.states}
    assert {error.name for error in exact.states} > recurrent
    for found, low, high in ((exact, 0, 1e-4), (rough, 1e-3, 1)):
        for errors in (found.states, *(drift.states for drift in found.drift)):
            assert low <= max(error.relative_max for error in errors) < high


def test_a_limit_of_kl_is_judged_with_what_is_known_of_it(clean, reference):
    manifest = open_artifact(clean("int4")).manifest
    found = held(clean("int4"), reference)

    def judged(limit: float) -> Check:
        checks = file_checks(found, manifest, {"reference.kl": limit})
        return next(check for check in checks if check.name == "reference.kl")

    margin = judged(0).margin
    known = found.kl_high.mean - found.kl.mean + 2 * found.kl.standard_error
    assert margin >= known > 0 and judged(0).value == found.kl.mean
    outcomes = [judged(found.kl.mean + share * margin).outcome for share in (1.01, 0, -1.01)]
    assert outcomes == ["PASS", "AMBIGUOUS", "FAIL"]


def look(artifact: Path, reference: ReferenceFile) -> list[LayerError]:
    opened = open_artifact(artifact)
    before: dict[int, State] = {}
    found = compare_with_file(OrtSession(opened), opened, reference, before)
    assert set(before) == set(reference.header.watched)
    layers = with_layers(found, opened, reference, before).layers
    assert [error.layer for error in layers] == [0, 1, 2]
    return layers


def test_each_layer_is_held_against_the_file(clean, file):
    reference = read_reference(file)
    exact, rough = look(clean("fp32"), reference), look(clean("int4"), reference)
    assert all(error.passed and error.relative_rms < 1e-5 for error in exact)
    assert all(error.passed and error.relative_rms > 1e-3 for error in rough)
    assert {error.worst_position for error in rough} <= set(reference.header.watched)


def test_the_first_layer_that_leaves_is_named(spoil, file, monkeypatch, capsys):
    """Without torch, from the file alone."""
    folder = spoil("fp32", weight=("layers.1.mlp_block.up_proj.weight", "data", 1.02))
    errors = look(folder, read_reference(file))
    assert [error.layer for error in errors if not error.passed] == [1, 2]
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    validate_artifacts([folder], Request(bisect=True), reference=file)
    shown = capsys.readouterr().out
    assert "layer 1 is the first whose residual stream leaves" in shown


def test_few_states_are_kept_where_they_are_large(file, monkeypatch):
    reference = read_reference(file)
    state, watched = {"x": np.zeros(100, np.int8)}, reference.header.watched
    assert positions_to_look_at(reference, state) == watched
    monkeypatch.setattr(against, "STATE_BYTES", 399)
    found = positions_to_look_at(reference, state)
    assert len(found) == 3 and {found[0], found[-1]} == {watched[0], watched[-1]}
    monkeypatch.setattr(against, "STATE_BYTES", 1)
    assert positions_to_look_at(reference, state) == watched[:1]


def another(tmp_path: Path, seed: int = 0, **change: Any) -> ReferenceFile:
    """A reference file of a model that differs from the one of `clean`."""
    config = dataclasses.replace(CONFIG, **change)
    weights = random_weights(config, seed)
    folder = write_hugging_face(config, weights, tmp_path / "model", dtype="bfloat16")
    return read_reference(capture(open_checkpoint(folder), tmp_path / "r", device="cpu"))


def test_a_value_that_is_not_finite_fails(spoil, reference):
    folder = spoil("fp32", weight=("final_norm.weight", "data", np.nan))
    assert failed(folder, reference) == ["reference.rms", "reference.finite"]
    assert wrong_tensors(folder, reference) == {"final_norm.weight"}


def test_other_weights_are_named_and_judged(clean, tmp_path, capsys):
    reference = another(tmp_path, seed=1)
    found = held(clean("int4"), reference)
    assert not found.same_files and found.config_differences == ()
    assert wrong_tensors(clean("int4"), reference) == set(model_tensors(CONFIG))
    assert (
        validate_artifacts([clean("fp32")], Request(max_tokens=20), reference=reference.path) == 1
    )
    shown = capsys.readouterr().out
    assert shown.startswith("FAIL") and "FAILED  reference.rms" in shown
    assert "the reference file is of other weight files" in shown


def test_another_window_is_named_and_judged(clean, tmp_path):
    reference = another(tmp_path, window=12)
    found = held(clean("fp32"), reference)
    assert found.config_differences == ("window: 16 → 12",)
    assert all(error.name.endswith(("rg_lru", "conv1d")) for error in found.states)
    assert "reference.rms" in failed(clean("fp32"), reference)
    assert wrong_tensors(clean("fp32"), reference) == set()


def test_another_shape_is_refused(clean, tmp_path):
    with pytest.raises(RequestError, match="its mlp_width is 80, the artifact's 96"):
        held(clean("fp32"), another(tmp_path, mlp_width=80))


def test_the_greedy_text(demo_artifact, tmp_path):
    """The file's is the model's own, and the common part is what the session says when asked."""
    (tmp_path / "p.txt").write_text("Once upon a time\nIt is a truth\n1, 2, 3\n")
    asked: dict[str, Any] = {"prompts": tmp_path / "p.txt", "device": "cpu"}
    demo = open_checkpoint(size="demo")
    reference = read_reference(capture(demo, tmp_path / "r", **asked))
    model = Reference(demo.config, demo.weights)
    session = OrtSession(open_artifact(demo_artifact))
    prompts = held(demo_artifact, reference).prompts
    assert {prompt.name for prompt in prompts} == {"p.txt 1", "p.txt 2", "p.txt 3"}
    for (index, _, span), prompt in zip(reference.spans(), prompts, strict=True):
        expected = reference.greedy(index).tolist()
        assert prompt.greedy_tokens == len(expected) >= 1
        hidden, _ = model.run(np.array([[*reference.tokens[span], *expected]]))
        likeliest = model.logits(hidden)[0].argmax(1).tolist()
        assert likeliest[span.stop - span.start - 1 : -1] == expected
        session.reset()
        said = [int(session.prefill(reference.tokens[None, span])[0, -1].argmax())]
        while said[: len(said)] == expected[: len(said)] and len(said) < len(expected):
            said.append(int(session.step(np.array(said[-1:]))[0].argmax()))
        common = len(said) if said == expected else len(said) - 1
        assert prompt.greedy_common == common


def test_validate_with_a_file(clean, file, tmp_path, capsys):
    """Beside the dequantized reference, where there is torch."""
    written: dict[str, Any] = {"json_file": tmp_path / "r.json", "html_file": tmp_path / "r.html"}
    request = Request(max_tokens=20)
    assert validate_artifacts([clean("int4")], request, reference=file, **written) == 0
    found = json.loads(written["json_file"].read_text())
    assert found["twin"] is not None and found["original"] is None
    positions = len(read_reference(file).tokens)
    assert found["reference"]["positions"] == positions
    names = [check["name"] for check in found["checks"]]
    assert "twin.logits" in names and "reference.rms" in names
    shown = capsys.readouterr().out
    assert "reference file" in shown and "reference.rms" not in shown
    page = written["html_file"].read_text("utf-8")
    assert "Against the reference file" in page and f"{positions:,} positions" in page
    assert page.count("reference.<wbr>rms") == 1


def test_without_torch_the_file_is_enough(clean, file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    target = tmp_path / "r.json"
    assert validate_artifacts([clean("int4")], reference=file, json_file=target) == 0
    found = json.loads(target.read_text())
    assert found["verdict"] == "PASS" and found["twin"] is None and found["original"] is None
    names = {check["name"] for check in found["checks"]}
    assert {"position", "reset.logits", "reference.rms", "reference.finite"} < names
    captured = capsys.readouterr()
    assert "dequantized reference is left out" in captured.err
    assert "dequantized reference: left out" in captured.out
