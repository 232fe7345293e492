"""Numbers of logits and states, and how they become verdicts: limits, tolerances and grades."""

import itertools
import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.commands.exports import _grade
from rgexport.errors import RequestError
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.griffin.state import POSITION, State
from rgexport.quantize.plan import COREML_PRECISIONS, choose_scheme, make_plan
from rgexport.quantize.schemes.registry import Ggml
from rgexport.validate import checks, metrics
from rgexport.validate.checks import GRADE_NAMES, GRADES, NAMES, Check, parse_limits, verdict
from rgexport.validate.measure import CHOICES, WORST, WorstPositions
from rgexport.validate.metrics import KL, Agreement, state_errors, worst
from tests.models import ODD_CONFIGS
from tests.validate.toys import manifest_of

CONFIG = ODD_CONFIGS["regular"]
ORDER = {name: index for index, name in enumerate(GRADE_NAMES)}


def check(value: float, margin: float = 0.0, limit: float = 1.0, **fields: str) -> Check:
    return Check(**{"name": "n", "reason": "r", **fields}, value=value, margin=margin, limit=limit)


OUTCOMES = {
    "PASS": [(1, 0), (0.8, 0.2)],
    "AMBIGUOUS": [(0.9, 0.2), (1.1, 0.2)],
    "FAIL": [(1.001, 0), (1.3, 0.2), (math.nan, 0), (0.5, math.nan)],
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_outcome_of_a_check(outcome):
    """For values, which may be off by a margin, at a limit of 1."""
    for judged in (check(value, margin) for value, margin in OUTCOMES[outcome]):
        assert judged.outcome == outcome and judged.passed is (outcome == "PASS")
        assert verdict([check(0), judged]) == outcome
    assert verdict([check(0.9, 0.2), check(2)]) == "FAIL"
    assert check(3, limit=2).excess == 1.5 and check(1, limit=0).excess == math.inf


def test_limits_that_users_set():
    limits = parse_limits(["steps=3", "dequantized.rms=0", "steps=2e-1"])
    assert limits == {"steps": 0.2, "dequantized.rms": 0}
    assert parse_limits(["twin.rms=0"]) == {"dequantized.rms": 0}, "its former name"
    assert parse_limits(f"{name}=1" for name in NAMES) == dict.fromkeys(NAMES, 1.0)
    judged = [check(0.5, name="steps.logits", kind="steps"), check(0.5, name="dequantized.rms")]
    one, two, three = checks.with_limits([*judged, check(0.5)], limits)
    assert (one.limit, two.limit, three.limit) == (0.2, 0, 1)
    assert one.outcome == two.outcome == "FAIL" and three.outcome == "PASS"
    assert one.reason == "asked for: r" and three.reason == "r"


@pytest.mark.parametrize("text", ["twin=1", "steps", "twin.rms=", "steps=-1", "steps=nan"])
def test_limits_that_make_no_sense(text):
    with pytest.raises(RequestError, match="expected") as error:
        parse_limits([text])
    names = "dequantized.rms" in str(error.value)
    assert text in str(error.value) and names == (text == "twin=1")


def manifest(kind, linear, embedding, compute="fp32", exact=False):
    if kind == "gguf":
        types = {EMBEDDING: embedding, "layers.0.mlp_block.up_proj.weight": linear}
        plan = {name: Ggml(types.get(name, "f32")) for name in model_tensors(CONFIG)}
    else:
        options = {"precisions": COREML_PRECISIONS} if kind == "coreml" else {}
        plan = make_plan(CONFIG, *(choose_scheme(word, **options) for word in (linear, embedding)))
    return replace(manifest_of(CONFIG), compute=compute, exact=exact, plan=plan, kind=kind)


@pytest.mark.parametrize(
    ("asked", "logits", "storage"),
    [
        (("onnx", "fp32", "fp32"), 1e-3, "float32"),
        (("onnx", "int4", "int4", "fp32", True), 1e-3, "int4"),
        (("onnx", "fp16", "fp16", "fp16"), 4e-2, "float16"),
        (("coreml", "int4", "int8", "fp32", True), 1e-3, "int4"),
        (("coreml", "pal4", "int8", "fp16", True), 6e-2, "int4"),
        (("gguf", "f16", "f32"), 4e-2, "float16"),
        (("gguf", "f16", "bf16"), 0.16, "int8"),
        (("gguf", "q2_k", "q6_k"), 0.6, "int2"),
    ],
)
def test_the_coarsest_arithmetic_and_storage_decide(asked, logits, storage):
    limit = checks.tolerance(manifest(*asked))
    assert limit.logits == logits and limit.at(0) == limit
    far = limit.at(131_072)
    assert far.logits - limit.logits == far.states - limit.states == pytest.approx(2**-10)
    assert checks.coarsest(manifest(*asked)) == storage and storage in checks.ORIGINAL_RMS


def graded(kl, top1, error=0.0, positions=10**9):
    quantiles = dict.fromkeys(("median", "p95", "p99", "max"), kl)
    flips = 0 if math.isnan(top1) else round((1 - top1) * positions)
    divergence = KL(mean=kl, standard_error=error, worst_position=0, **quantiles)
    agreed = Agreement(top1=top1, top5=1.0, largest_flip_margin=0.0, flips=flips, near_ties=0)
    return checks.grade_quality("original", divergence, agreed, positions)


@pytest.mark.parametrize(
    ("kl", "top1", "grade", "decided_by"),
    [
        (0.0, 1.0, "lossless", "kl"),
        (7.2e-3, 0.94, "good", "kl"),  # q4_k_m
        (2e-2, 0.9, "fair", "kl"),
        (5.73e-2, 0.8307, "poor", "kl"),  # int4, rounded to nearest
        (1e-3, 0.83, "poor", "top1"),
        (0.0, math.nan, "poor", "top1"),
    ],
)
def test_grades_of_known_formats(kl, top1, grade, decided_by):
    quality = graded(kl, top1)
    assert (quality.grade, quality.decided_by) == (grade, decided_by)


def test_a_poor_export_is_not_told_to_take_what_it_took(capsys):
    artifact = Mock(**{"manifest.check.status": "verified", "manifest.check.kl": 1.0})
    assert _grade(artifact, Mock(quality="best")) == "poor"
    assert "answers: more bits lose less;" in capsys.readouterr().err


SHARE, MARGIN = st.floats(0, 1), st.floats(0, 0.1)


@given(SHARE, SHARE, MARGIN, st.integers(1, 10_000), SHARE)
def test_a_worse_number_gives_no_better_grade(kl, top1, error, positions, more):
    quality = graded(kl, top1, error, positions)
    assert ORDER[quality.best] <= ORDER[quality.grade] <= ORDER[quality.worst]
    limits = GRADES[ORDER[quality.grade]]
    assert kl <= limits.kl and top1 >= limits.top1
    for worse in (graded(kl + more, top1), graded(kl, top1 * (1 - more))):
        assert ORDER[worse.grade] >= ORDER[quality.grade]
    assert all(quality.reaches(name) == (ORDER[quality.grade] <= ORDER[name]) for name in ORDER)


def test_margins_are_two_standard_errors():
    """KL's own; that of a share of positions."""
    quality = graded(0.0145, 0.95, error=4e-4, positions=1000)
    assert quality.kl_margin == pytest.approx(8e-4)
    assert quality.top1_margin == pytest.approx(2 * math.sqrt(0.95 * 0.05 / 1000), rel=0.02)
    assert (quality.best, quality.grade, quality.worst) == ("good", "good", "fair")


def compared(reference: list[list[float]], candidate: list[list[float]]) -> np.ndarray:
    pair = (np.array(rows, np.float32) for rows in (reference, candidate))
    return metrics.compare_logits(*pair)


def test_choices_flips_and_near_ties():
    rows = compared(
        [[9, 8, 7, 6, 5, 0, 0], [1, 2, 0, 0, 0, 0, 0]],
        [[9, 8, 7, 6, 0, 5, 0], [2, 1, 0, 0, 0, 0, 0]],
    )
    assert rows["top1"].tolist() == [True, False] and rows["top5"][0] == pytest.approx(0.8)
    assert rows["flip_margin"].tolist() == [0, 1] and metrics.likelihood(rows, 4) is None
    # Two of three positions flip, which the reference leads by 0.1 and by 2.
    reference = [[4, 3.9, -4, -4], [4, 2, -4, -4], [4, 2, -4, -4]]
    rows = compared(reference, [[3, 3.9, -4, -4], [1, 2, -4, -4], [4, 2, -4, -4]])
    limit = 0.1 / np.std(reference[0]) / 2**0.5
    for noise, near_ties in ((0, 0), (0.999 * limit, 0), (1.001 * limit, 1), (0.1, 1), (10, 2)):
        agreement = metrics.agreement(rows, noise)
        assert (agreement.flips, agreement.near_ties) == (2, near_ties)


@given(length=st.integers(1, 60), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_the_worst_positions_do_not_depend_on_the_blocks(length, cuts):
    rng = np.random.default_rng(length)
    kl, tokens = rng.permutation(length) / 7, rng.integers(0, 9, length)
    a, b = rng.normal(size=(2, length, 9))
    seen = WorstPositions(tokens)
    for start, stop in itertools.pairwise(sorted({0, length, *(min(cut, length) for cut in cuts)})):
        seen.add(start, kl[start:stop], a[start:stop], b[start:stop])
    assert [place.position for place in seen.worst] == np.argsort(-kl)[:WORST].tolist()
    for place in seen.worst:
        assert place.kl == kl[place.position]
        for choices, logits in ((place.reference, a), (place.candidate, b)):
            share = np.exp(logits[place.position])
            share /= share.sum()
            likeliest = np.argsort(-share)[:CHOICES]
            assert [choice.token for choice in choices] == likeliest.tolist()
            assert [choice.probability for choice in choices] == pytest.approx(share[likeliest])


def state_of(**arrays: list[float]) -> State:
    state = {f"layers.0.{name}": np.array([a], np.float32) for name, a in arrays.items()}
    return state | {POSITION: np.array([3])}


def test_errors_of_states_are_relative_to_the_reference():
    key, value = state_errors(
        state_of(key=[3, -4], value=[1, 1]), state_of(key=[3, -2], value=[1, 1])
    )
    assert (key.name, key.relative_max, key.relative_norm) == ("layers.0.key", 0.5, 0.4)
    assert (value.relative_max, value.relative_norm) == (0, 0)
    assert worst([key, value]) == 0.5 and worst([]) == 0
    (zeros,) = state_errors(state_of(key=[0, 0]), state_of(key=[0, 0.25]))
    assert zeros.relative_max == zeros.relative_norm == 0.25
    assert np.isnan(worst(state_errors(state_of(key=[1]), state_of(key=[np.nan]))))
    shorter = state_errors(state_of(key=[1, 2, 3], rg_lru=[1]), state_of(key=[1, 2], rg_lru=[1]))
    assert [error.name for error in shorter] == ["layers.0.rg_lru"], "another window is left out"
