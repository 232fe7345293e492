import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from rgexport.export.manifest import Manifest
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize.plan import COREML_PRECISIONS, choose_scheme, make_plan
from rgexport.quantize.scheme import Ggml
from rgexport.validate import thresholds
from rgexport.validate.thresholds import Check
from tests.models import ODD_CONFIGS

CONFIG = ODD_CONFIGS["regular"]


@dataclasses.dataclass
class Asked:
    """The fields of a manifest that decide about tolerances."""

    compute: str
    exact: bool
    plan: dict[str, Any]
    kind: str = "onnx"
    rounds_activations = Manifest.rounds_activations


def asked(linear: str, embedding: str, compute: str = "fp32", exact: bool = False) -> Manifest:
    plan = make_plan(CONFIG, choose_scheme(linear), choose_scheme(embedding))
    return cast(Manifest, Asked(compute, exact, plan))


def asked_coreml(linear: str, embedding: str, compute: str) -> Manifest:
    words = COREML_PRECISIONS
    schemes = (choose_scheme(word, words=words) for word in (linear, embedding))
    plan = make_plan(CONFIG, *schemes)
    return cast(Manifest, Asked(compute, True, plan, "coreml"))


def asked_gguf(linear: str, embedding: str) -> Manifest:
    types = {EMBEDDING: embedding, "layers.0.mlp_block.up_proj.weight": linear}
    plan = {name: Ggml(types.get(name, "f32")) for name in model_tensors(CONFIG)}
    return cast(Manifest, Asked("fp32", False, plan, "gguf"))


@pytest.mark.parametrize(
    ("linear", "embedding", "logits", "storage"),
    [
        ("f32", "f32", 1e-3, "float32"),
        ("f16", "f32", 4e-2, "float16"),
        ("f16", "bf16", 0.16, "int8"),
        ("bf16", "bf16", 0.16, "int8"),
        ("q8_0", "f16", 0.6, "int8"),
        ("f32", "q6_k", 0.6, "int4"),
        ("q4_k", "q6_k", 0.6, "int4"),
    ],
)
def test_a_gguf_file_is_judged_by_the_type_that_rounds_most(
    linear: str, embedding: str, logits: float, storage: str
) -> None:
    manifest = asked_gguf(linear, embedding)
    assert thresholds.tolerance(manifest).logits == logits
    assert thresholds.coarsest(manifest) == storage
    assert manifest.rounds_activations == any(word[0] == "q" for word in (linear, embedding))


@pytest.mark.parametrize(
    ("manifest", "logits"),
    [
        (asked("fp32", "fp32"), 1e-3),
        (asked("int4", "int4", exact=True), 1e-3),
        (asked("fp16", "fp16", "fp16"), 4e-2),
        (asked("int4", "int4", "fp16", exact=True), 4e-2),
        (asked("int8", "int8"), 0.6),
        (asked("fp32", "int4"), 0.6),
        (asked("int4", "int4", "fp16"), 0.6),
        (asked_coreml("fp32", "fp32", "fp32"), 1e-3),
        (asked_coreml("int4", "int8", "fp32"), 1e-3),
        (asked_coreml("fp16", "fp16", "fp16"), 6e-2),
        (asked_coreml("pal4", "int8", "fp16"), 6e-2),
    ],
)
def test_the_tolerance_follows_from_the_arithmetic(manifest: Manifest, logits: float) -> None:
    assert thresholds.tolerance(manifest).logits == logits


@pytest.mark.parametrize(
    ("linear", "embedding", "storage"),
    [
        ("fp32", "fp32", "float32"),
        ("fp16", "fp32", "float16"),
        ("int8", "fp16", "int8"),
        ("int4", "int8", "int4"),
    ],
)
def test_the_coarsest_storage_decides_what_is_a_ruin(
    linear: str, embedding: str, storage: str
) -> None:
    assert thresholds.coarsest(asked(linear, embedding)) == storage
    assert thresholds.coarsest(asked_coreml(linear, embedding, "fp16")) == storage
    assert storage in thresholds.ORIGINAL_RMS


def test_a_palette_is_as_coarse_as_its_bits() -> None:
    assert thresholds.coarsest(asked_coreml("pal4", "int8", "fp16")) == "int4"


@pytest.mark.parametrize(
    ("value", "passed"), [(0, True), (1, True), (1.01, False), (np.inf, False), (np.nan, False)]
)
def test_a_limit_is_inclusive_and_nan_never_passes(value: float, passed: bool) -> None:
    assert Check(name="n", value=value, limit=1, reason="r").passed is passed


def test_a_tolerance_grows_with_position() -> None:
    limit = thresholds.tolerance(asked("fp32", "fp32"))
    assert limit.at(0) == limit
    assert limit.at(1000).logits < 1.01 * limit.logits
    far = limit.at(131_072)
    assert far.logits - limit.logits == far.states - limit.states == pytest.approx(2**-10)
