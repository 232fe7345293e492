"""Artifacts against reference files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.reference import Reference
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate.checks import TENSOR_CHECKS
from rgexport.validate.metrics import (
    StateError,
    agreement,
    compare_logits,
    kl_summary,
    logit_error,
)
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.reference import against
from rgexport.validate.reference.capture import capture, choose_positions
from rgexport.validate.reference.reference_file import (
    ReferenceFile,
    decode_logits,
    encode_logits,
    read_reference,
)
from rgexport.validate.run import validate_artifacts
from rgexport.validate.weights.weight_limits import sketch_checks
from tests.models import random_weights, write_hugging_face
from tests.validate.conftest import CONFIG

CAPTURE = "rgexport.validate.reference.capture"


@pytest.fixture(scope="module", params=[40, 10**9])
def some(request, checkpoint, tmp_path_factory) -> ReferenceFile:
    """A file of the small model with logits at some positions or at all."""
    target = tmp_path_factory.mktemp("reference") / "r"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOGITS_BYTES": 0, "LEAST_POSITIONS": request.param}.items():
            patch.setattr(f"{CAPTURE}.{name}", value)
        return read_reference(capture(open_checkpoint(checkpoint), target, device="cpu"))


@pytest.fixture(scope="module")
def reference(checkpoint, tmp_path_factory) -> ReferenceFile:
    target = tmp_path_factory.mktemp("reference") / "r"
    return read_reference(capture(open_checkpoint(checkpoint), target, device="cpu"))


def held(artifact: Path, reference: ReferenceFile) -> against.AgainstFile:
    opened = open_artifact(artifact)
    return against.compare_with_file(OrtSession(opened), opened, reference)


def failed(artifact: Path, found: against.AgainstFile) -> list[str]:
    checks = against.file_checks(found, open_artifact(artifact).manifest, {})
    return [check.name for check in checks if not check.passed and check.kind not in TENSOR_CHECKS]


def wrong_tensors(found: against.AgainstFile) -> set[str]:
    """Those whose weights are not what the reference's sketches say."""
    names = {check.name for check in sketch_checks(found.weights) if not check.passed}
    return {name.removeprefix("reference.").rpartition(".")[0] for name in names}


@pytest.mark.parametrize("kind", ["int8", "int4-exact"])
def test_it_equals_a_comparison_of_exact_logits(clean, checkpoint, some, kind):
    original = open_checkpoint(checkpoint)
    model = Reference(original.config, original.weights)
    session, rows = OrtSession(open_artifact(clean(kind))), []
    for _, prompt, span in some.spans():
        tokens = some.tokens[span]
        hidden, _ = model.run(tokens[None])
        session.reset()
        ours = session.prefill(tokens[None], prompt.tokens)[0]
        every = compare_logits(model.logits(hidden)[0], ours, np.append(tokens[1:], -1))
        rows.append(every[list(prompt.positions)])
    found, expected = held(clean(kind), some), np.concatenate(rows)
    assert failed(clean(kind), found) == []
    assert found.positions == len(expected) and found.positions in (40, found.tokens)
    summary = kl_summary(expected)
    assert found.kl.mean == pytest.approx(summary.mean, rel=0.01)
    assert found.kl.standard_error == pytest.approx(summary.standard_error, rel=0.01)
    assert found.logits.relative_rms == pytest.approx(logit_error(expected).relative_rms, rel=0.01)
    assert found.agreement.top1 == pytest.approx(agreement(expected).top1, abs=1e-9)
    assert found.agreement.top5 == pytest.approx(agreement(expected).top5, abs=0.01)
    known = expected[expected["has_next"]]
    assert found.likelihood.tokens == len(known)
    assert found.likelihood.nll == pytest.approx(known["nll"].mean(), rel=1e-4)
    delta = (known["nll_candidate"] - known["nll"]).mean()
    assert found.likelihood.delta == pytest.approx(delta, abs=1e-4)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 99))
def test_positions_are_spread_over_all_prompts(lengths, most):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOGITS_BYTES": 2 * 7 * most, "LEAST_POSITIONS": 0}.items():
            patch.setattr(f"{CAPTURE}.{name}", value)
        chosen = choose_positions(lengths, 7)
    assert [positions[-1] for positions in chosen] == [length - 1 for length in lengths]
    assert all(positions == sorted(set(positions)) for positions in chosen)
    assert sum(map(len, chosen)) == min(sum(lengths), max(most, len(lengths)))


@pytest.mark.parametrize(("spread", "delta"), [(0, 0), (1e-3, 1e-6), (5, 4.5e-3), (9, 0.1)])
def test_logits_in_16_bits_give_the_same_kl(spread, delta):
    """A KL of 1e-5 among them; constant rows are exact."""
    rng = np.random.default_rng(1)
    exact = (spread * rng.standard_normal((200, 3000))).astype(np.float32) + np.float32(7)
    other = exact + np.float32(delta) * rng.standard_normal(exact.shape).astype(np.float32)
    stored = decode_logits(*encode_logits(exact))
    assert np.abs(stored - exact).max() <= np.ptp(exact) / 65535 * 0.51 + 1e-6
    kl = [compare_logits(rows, other)["kl"].mean() for rows in (exact, stored)]
    assert kl[1] == pytest.approx(kl[0], rel=0.01, abs=1e-12)


def test_a_limit_of_kl_is_judged_with_its_standard_error(clean, reference):
    found, manifest = held(clean("int4"), reference), open_artifact(clean("int4")).manifest
    margin = 2 * found.kl.standard_error
    for share, outcome in ((1.01, "PASS"), (0, "AMBIGUOUS"), (-1.01, "FAIL")):
        limits = {"reference.kl": found.kl.mean + share * margin}
        checks = against.file_checks(found, manifest, limits)
        (check,) = (check for check in checks if check.name == "reference.kl")
        assert (check.value, check.margin, check.outcome) == (found.kl.mean, margin, outcome)


@pytest.mark.parametrize(("kind", "low", "high"), [("fp32", 0, 1e-4), ("int4", 1e-3, 1)])
def test_states_are_held_against_the_file(clean, reference, kind, low, high):
    """Those at the end and on the way."""
    found = held(clean(kind), reference)
    assert failed(clean(kind), found) == [] and wrong_tensors(found) == set()
    assert found.same_files and found.config_differences == ()
    longest = max(reference.header.prompts, key=lambda prompt: prompt.tokens)
    assert [drift.position for drift in found.drift] == list(longest.checkpoints) != []
    recurrent = {"layers.0.rg_lru", "layers.0.conv1d", "layers.1.rg_lru", "layers.1.conv1d"}
    assert {error.name for error in found.states} > recurrent
    assert all({error.name for error in drift.states} == recurrent for drift in found.drift)
    for errors in (found.states, *(drift.states for drift in found.drift)):
        assert low <= max(error.relative_max for error in errors) < high


def test_a_value_that_is_not_finite_fails(spoil, reference):
    folder = spoil("fp32", weight=("final_norm.weight", np.nan))
    found = held(folder, reference)
    assert failed(folder, found) == ["reference.rms", "reference.finite"]
    assert wrong_tensors(found) == {"final_norm.weight"}


def test_a_state_that_is_no_number_stays_the_worst():
    errors = [StateError(name="s", relative_max=x, relative_norm=x) for x in (0.1, np.nan, 0.5)]
    (worst,) = against._worst_states(errors)
    assert np.isnan(worst.relative_max)


def another(tmp_path, seed=0, **change) -> ReferenceFile:
    """A reference file of a model that differs from the one of `clean`."""
    config = dataclasses.replace(CONFIG, **change)
    weights = random_weights(config, seed)
    folder = write_hugging_face(config, weights, tmp_path / "model", dtype="bfloat16")
    return read_reference(capture(open_checkpoint(folder), tmp_path / "r", device="cpu"))


def test_other_weights_are_named_and_judged(clean, tmp_path, capsys):
    other, request = another(tmp_path, seed=1), ValidationRequest(max_tokens=20)
    assert wrong_tensors(held(clean("int4"), other)) == set(model_tensors(CONFIG))
    assert validate_artifacts([clean("fp32")], dataclasses.replace(request, reference=other)) == 1
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
