"""Artifacts against reference files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.reference import Reference
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate.checks import TENSOR_CHECKS
from rgexport.validate.metrics import agreement, compare_logits
from rgexport.validate.opening import Request
from rgexport.validate.reference import against, kept_logits
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
def some_full(request, checkpoint, tmp_path_factory) -> ReferenceFile:
    """A file of the small model; in all of them but one only few positions are full."""
    target = tmp_path_factory.mktemp("reference") / "r"
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"LOGITS_BYTES": LIMITS[request.param], "FULL": 16, "LEAST_MOST": 40}
        for name, value in sizes.items():
            patch.setattr(kept_logits, name, value)
        capture(open_checkpoint(checkpoint), target, device="cpu")
    reference = read_reference(target)
    assert reference.header.tail_bits == int(request.param.replace("full", "0"))
    return reference


@pytest.fixture(scope="module")
def reference(checkpoint, tmp_path_factory) -> ReferenceFile:
    target = tmp_path_factory.mktemp("reference") / "r"
    return read_reference(capture(open_checkpoint(checkpoint), target, device="cpu"))


def held(artifact: Path, reference: ReferenceFile) -> against.AgainstFile:
    opened = open_artifact(artifact)
    return against.compare_with_file(OrtSession(opened), opened, reference)


def failed(artifact: Path, found: against.AgainstFile) -> list[str]:
    checks = against.file_checks(found, open_artifact(artifact).manifest)
    return [check.name for check in checks if not check.passed and check.kind not in TENSOR_CHECKS]


def wrong_tensors(found: against.AgainstFile) -> set[str]:
    """Those whose weights are not what the reference's sketches say."""
    names = {check.name for check in sketch_checks(found.weights) if not check.passed}
    return {name.removeprefix("reference.").rpartition(".")[0] for name in names}


def test_it_equals_a_comparison_of_all_logits(clean, checkpoint, some_full):
    original = open_checkpoint(checkpoint)
    model = Reference(original.config, original.weights)
    session, rows = OrtSession(open_artifact(clean("int4-exact"))), []
    for _, prompt, span in some_full.spans():
        tokens = some_full.tokens[span]
        hidden, _ = model.run(tokens[None])
        session.reset()
        ours = session.prefill(tokens[None], prompt.tokens)[0]
        rows.append(compare_logits(model.logits(hidden)[0], ours, np.append(tokens[1:], -1)))
    found, all_rows = held(clean("int4-exact"), some_full), np.concatenate(rows)
    assert failed(clean("int4-exact"), found) == []
    kl = all_rows["kl"].mean()
    assert found.kl_low.mean * 0.9999 <= kl <= found.kl_high.mean * 1.0001
    if found.full_positions == found.positions or some_full.header.tail_bits == 16:
        assert found.kl.mean == pytest.approx(kl, rel=1e-4) and found.kl_width < 2e-3
    elif some_full.header.tail_bits == 8:
        assert found.kl.mean == pytest.approx(kl, rel=0.03)
    assert (found.kl_full == found.kl) is (found.full_positions == found.positions)
    assert some_full.is_full(found.kl_full.worst_position)
    assert 0.2 * kl < found.kl_full.mean < 5 * kl and found.kl_full.standard_error > 0
    expected = agreement(all_rows)
    assert found.agreement.top1 == pytest.approx(expected.top1, abs=1e-9)
    assert found.agreement.top5 == pytest.approx(expected.top5, abs=1e-9)
    known = all_rows[all_rows["has_next"]]
    assert found.likelihood.tokens == len(known)
    assert found.likelihood.nll == pytest.approx(known["nll"].mean(), rel=1e-5)
    delta = (known["nll_candidate"] - known["nll"]).mean()
    assert found.likelihood.delta == pytest.approx(delta, abs=1e-5)


def test_a_limit_of_kl_is_judged_with_what_is_known_of_it(clean, some_full):
    found, manifest = held(clean("int4"), some_full), open_artifact(clean("int4")).manifest

    def judged(limit):
        checks = against.file_checks(found, manifest, {"reference.kl": limit})
        return next(check for check in checks if check.name == "reference.kl")

    margin = judged(0).margin
    known = found.kl_high.mean - found.kl.mean + 2 * found.kl.standard_error
    assert margin >= known > 0 and judged(0).value == found.kl.mean
    outcomes = [judged(found.kl.mean + share * margin).outcome for share in (1.01, 0, -1.01)]
    assert outcomes == ["PASS", "AMBIGUOUS", "FAIL"]


def look(artifact, reference) -> tuple[against.AgainstFile, list[against.LayerError]]:
    opened, before = open_artifact(artifact), {}
    found = against.compare_with_file(OrtSession(opened), opened, reference, before)
    return found, against.with_layers(found, opened, reference, before).layers


@pytest.mark.parametrize(("kind", "low", "high"), [("fp32", 0, 1e-4), ("int4", 1e-3, 1)])
def test_states_and_layers_are_held_against_the_file(clean, reference, kind, low, high):
    """States at the end and on the way."""
    found, layers = look(clean(kind), reference)
    assert failed(clean(kind), found) == [] and wrong_tensors(found) == set()
    assert found.same_files and found.config_differences == ()
    longest = max(reference.header.prompts, key=lambda prompt: prompt.tokens)
    assert [drift.position for drift in found.drift] == list(longest.checkpoints) != []
    recurrent = {"layers.0.rg_lru", "layers.0.conv1d", "layers.1.rg_lru", "layers.1.conv1d"}
    assert {error.name for error in found.states} > recurrent
    assert all({error.name for error in drift.states} == recurrent for drift in found.drift)
    for errors in (found.states, *(drift.states for drift in found.drift)):
        assert low <= max(error.relative_max for error in errors) < high
    assert [error.layer for error in layers] == [0, 1, 2]
    limit = 1e-5 if kind == "fp32" else 1
    assert all(error.passed and low < error.relative_rms < limit for error in layers)
    assert {error.worst_position for error in layers} <= set(reference.header.watched)


def test_the_first_layer_that_leaves_is_named(spoil, reference, capsys):
    folder = spoil("fp32", weight=("layers.1.mlp_block.up_proj.weight", 1.02))
    _, errors = look(folder, reference)
    assert [error.layer for error in errors if not error.passed] == [1, 2]
    validate_artifacts([folder], Request(bisect=True), reference=reference.path)
    assert "layer 1 is the first whose residual stream leaves" in capsys.readouterr().out


def test_a_value_that_is_not_finite_fails(spoil, reference):
    folder = spoil("fp32", weight=("final_norm.weight", np.nan))
    found = held(folder, reference)
    assert failed(folder, found) == ["reference.rms", "reference.finite"]
    assert wrong_tensors(found) == {"final_norm.weight"}


def another(tmp_path, seed=0, **change) -> ReferenceFile:
    """A reference file of a model that differs from the one of `clean`."""
    config = dataclasses.replace(CONFIG, **change)
    weights = random_weights(config, seed)
    folder = write_hugging_face(config, weights, tmp_path / "model", dtype="bfloat16")
    return read_reference(capture(open_checkpoint(folder), tmp_path / "r", device="cpu"))


def test_other_weights_are_named_and_judged(clean, tmp_path, capsys):
    other, request = another(tmp_path, seed=1), Request(max_tokens=20)
    assert wrong_tensors(held(clean("int4"), other)) == set(model_tensors(CONFIG))
    assert validate_artifacts([clean("fp32")], request, reference=other.path) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("FAIL") and "FAILED  reference.rms" in shown
    assert "the reference file is of other weight files" in shown


def test_another_shape_is_refused(clean, tmp_path):
    with pytest.raises(RequestError, match="its mlp_width is 80, the artifact's 96"):
        held(clean("fp32"), another(tmp_path / "shape", mlp_width=80))


def test_the_greedy_text(demo_artifact, tmp_path):
    """It is the model's own; what is in common with a session's is counted."""
    (tmp_path / "p.txt").write_text("Once upon a time\n1, 2, 3\n")
    demo = open_checkpoint(size="demo")
    file = capture(demo, tmp_path / "r", prompts=tmp_path / "p.txt", device="cpu")
    reference = read_reference(file)
    model, session = Reference(demo.config, demo.weights), OrtSession(open_artifact(demo_artifact))
    prompts = held(demo_artifact, reference).prompts
    assert [prompt.name for prompt in prompts] == ["p.txt 1", "p.txt 2"]
    for (index, _, span), prompt in zip(reference.spans(), prompts, strict=True):
        expected = reference.greedy(index).tolist()
        assert prompt.greedy_tokens == len(expected) >= 1
        hidden, _ = model.run(np.array([[*reference.tokens[span], *expected]]))
        likeliest = model.logits(hidden)[0].argmax(1).tolist()
        assert likeliest[span.stop - span.start - 1 : -1] == expected
        session.reset()
        logits, common = session.prefill(reference.tokens[None, span])[:, -1], 0
        while common < len(expected) and logits.argmax() == expected[common]:
            logits, common = session.step(logits.argmax(1)), common + 1
        assert prompt.greedy_common == common
