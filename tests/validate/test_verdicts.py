"""How numbers become verdicts: outcomes of checks, limits, tolerances and grades."""

import dataclasses
import math
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.export.manifest import Manifest
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize.plan import COREML_PRECISIONS, choose_scheme, make_plan
from rgexport.quantize.scheme import Ggml
from rgexport.validate.checks import NAMES, Check, parse_limits, verdict, with_limits
from rgexport.validate.metrics import KL, Agreement
from rgexport.validate.quality import GRADE_NAMES, GRADES, Quality, grade_quality
from rgexport.validate.thresholds import ORIGINAL_RMS, coarsest, tolerance
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["regular"]
ORDER = {name: index for index, name in enumerate(GRADE_NAMES)}


def check(value: float, margin: float = 0.0, limit: float = 1.0, **fields: str) -> Check:
    return Check(**{"name": "n", "reason": "r", **fields}, value=value, margin=margin, limit=limit)


@pytest.mark.parametrize(
    ("value", "margin", "outcome"),
    [
        (1, 0, "PASS"),
        (1.001, 0, "FAIL"),
        (0.8, 0.2, "PASS"),
        (0.9, 0.2, "AMBIGUOUS"),
        (1.1, 0.2, "AMBIGUOUS"),
        (1.3, 0.2, "FAIL"),
        (math.nan, 0, "FAIL"),
        (0.5, math.nan, "FAIL"),
    ],
)
def test_the_outcome_of_a_check(value, margin, outcome):
    judged = check(value, margin)
    assert judged.outcome == outcome and judged.passed is (outcome == "PASS")
    assert verdict([check(0), judged]) == outcome and verdict([check(0.9, 0.2), check(2)]) == "FAIL"
    assert check(3, limit=2).excess == 1.5
    assert check(math.nan).excess == check(1, limit=0).excess == math.inf


def test_limits_that_users_set():
    limits = parse_limits(["steps=3", "twin.rms=0", "steps=2e-1"])
    assert limits == {"steps": 0.2, "twin.rms": 0}
    assert parse_limits(f"{name}=1" for name in NAMES) == dict.fromkeys(NAMES, 1.0)
    one, two, three = with_limits(
        [check(0.5, name="steps.logits", kind="steps"), check(0.5, name="twin.rms"), check(0.5)],
        limits,
    )
    assert (one.limit, two.limit, three.limit) == (0.2, 0, 1)
    assert one.outcome == two.outcome == "FAIL" and three.outcome == "PASS"
    assert one.reason == "asked for: r" and three.reason == "r"


@pytest.mark.parametrize("text", ["twin=1", "twin.rms", "twin.rms=", "twin.rms=-1", "steps=nan"])
def test_limits_that_make_no_sense(text):
    with pytest.raises(RequestError, match="expected") as error:
        parse_limits([text])
    assert text in str(error.value) and ("twin" not in text or "twin.rms" in str(error.value))


@dataclasses.dataclass
class Asked:
    """The fields of a manifest that decide about tolerances."""

    compute: str
    exact: bool
    plan: dict[str, Any]
    kind: str = "onnx"
    rounds_activations = Manifest.rounds_activations


def onnx(linear: str, embedding: str, compute: str = "fp32", exact: bool = False) -> Manifest:
    plan = make_plan(CONFIG, choose_scheme(linear), choose_scheme(embedding))
    return cast(Manifest, Asked(compute, exact, plan))


def coreml(linear: str, embedding: str, compute: str) -> Manifest:
    schemes = (choose_scheme(word, words=COREML_PRECISIONS) for word in (linear, embedding))
    return cast(Manifest, Asked(compute, True, make_plan(CONFIG, *schemes), "coreml"))


def gguf(linear: str, embedding: str) -> Manifest:
    types = {EMBEDDING: embedding, "layers.0.mlp_block.up_proj.weight": linear}
    plan = {name: Ggml(types.get(name, "f32")) for name in model_tensors(CONFIG)}
    return cast(Manifest, Asked("fp32", False, plan, "gguf"))


@pytest.mark.parametrize(
    ("manifest", "logits", "storage"),
    [
        (onnx("fp32", "fp32"), 1e-3, "float32"),
        (onnx("int4", "int4", exact=True), 1e-3, "int4"),
        (onnx("fp16", "fp16", "fp16"), 4e-2, "float16"),
        (onnx("int8", "fp16"), 0.6, "int8"),
        (coreml("int4", "int8", "fp32"), 1e-3, "int4"),
        (coreml("pal4", "int8", "fp16"), 6e-2, "int4"),
        (gguf("f16", "f32"), 4e-2, "float16"),
        (gguf("f16", "bf16"), 0.16, "int8"),
        (gguf("f32", "q6_k"), 0.6, "int4"),
        (gguf("q2_k", "q6_k"), 0.6, "int2"),
    ],
)
def test_the_coarsest_arithmetic_and_storage_decide(manifest, logits, storage):
    limit = tolerance(manifest)
    assert limit.logits == logits and limit.at(0) == limit
    far = limit.at(131_072)
    assert far.logits - limit.logits == far.states - limit.states == pytest.approx(2**-10)
    assert coarsest(manifest) == storage and storage in ORIGINAL_RMS


def graded(
    kl: float, top1: float, error: float = 0.0, positions: int = 10**9, interval: float = 0.0
) -> Quality:
    quantiles = dict.fromkeys(("median", "p95", "p99", "max"), kl)
    flips = 0 if math.isnan(top1) else round((1 - top1) * positions)
    divergence = KL(mean=kl, standard_error=error, worst_position=0, **quantiles)
    agreed = Agreement(top1=top1, top5=1.0, largest_flip_margin=0.0, flips=flips, near_ties=0)
    return grade_quality("original", divergence, agreed, positions, interval)


@pytest.mark.parametrize(
    ("kl", "top1", "grade", "decided_by"),
    [
        (0.0, 1.0, "lossless", "kl"),
        (5e-4, 0.98, "lossless", "kl"),
        (7.2e-3, 0.94, "good", "kl"),  # q4_k_m
        (2e-2, 0.9, "fair", "kl"),
        (5.73e-2, 0.8307, "poor", "kl"),  # int4, rounded to nearest
        (1e-3, 0.83, "poor", "top1"),
        (math.nan, 1.0, "poor", "kl"),
        (0.0, math.nan, "poor", "top1"),
    ],
)
def test_grades_of_known_formats(kl, top1, grade, decided_by):
    quality = graded(kl, top1)
    assert (quality.grade, quality.decided_by) == (grade, decided_by)


SHARE, MARGIN = st.floats(0, 1), st.floats(0, 0.1)


@given(SHARE, SHARE, MARGIN, st.integers(1, 10_000), MARGIN, SHARE)
def test_a_worse_number_gives_no_better_grade(kl, top1, error, positions, interval, more):
    quality = graded(kl, top1, error, positions, interval)
    assert ORDER[quality.best] <= ORDER[quality.grade] <= ORDER[quality.worst]
    assert quality.certain is (quality.best == quality.worst)
    limits = GRADES[ORDER[quality.grade]]
    assert kl <= limits.kl and top1 >= limits.top1
    for worse in (graded(kl + more, top1), graded(kl, top1 * (1 - more))):
        assert ORDER[worse.grade] >= ORDER[quality.grade]
    assert all(quality.reaches(name) == (ORDER[quality.grade] <= ORDER[name]) for name in ORDER)


def test_margins_are_two_standard_errors():
    """KL's own, with the interval of a file; that of a share of positions."""
    quality = graded(0.014, 0.95, error=4e-4, positions=1000, interval=3e-4)
    assert quality.kl_margin == pytest.approx(1.1e-3)
    assert quality.top1_margin == pytest.approx(2 * math.sqrt(0.95 * 0.05 / 1000), rel=0.02)
    assert (quality.best, quality.grade, quality.worst) == ("good", "good", "fair")
    few = graded(0.0, 1.0, positions=8)
    assert few.grade == "lossless" and few.worst != "lossless", "eight tokens show little"
