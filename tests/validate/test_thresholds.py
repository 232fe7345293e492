import dataclasses
from typing import Any, cast

import pytest

from rgexport.export.manifest import Manifest
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.quantize.plan import COREML_PRECISIONS, choose_scheme, make_plan
from rgexport.quantize.scheme import Ggml
from rgexport.validate.thresholds import ORIGINAL_RMS, coarsest, tolerance
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
        (onnx("int4", "int4", "fp16"), 0.6, "int4"),
        (coreml("int4", "int8", "fp32"), 1e-3, "int4"),
        (coreml("pal4", "int8", "fp16"), 6e-2, "int4"),
        (gguf("f32", "f32"), 1e-3, "float32"),
        (gguf("f16", "f32"), 4e-2, "float16"),
        (gguf("f16", "bf16"), 0.16, "int8"),
        (gguf("q8_0", "f16"), 0.6, "int8"),
        (gguf("f32", "q6_k"), 0.6, "int4"),
        (gguf("q2_k", "q6_k"), 0.6, "int2"),
    ],
)
def test_the_coarsest_arithmetic_and_storage_decide(manifest, logits, storage):
    assert tolerance(manifest).logits == logits
    assert coarsest(manifest) == storage and storage in ORIGINAL_RMS
    if manifest.kind == "gguf":
        assert manifest.rounds_activations == (logits == 0.6)


def test_a_tolerance_grows_with_position():
    limit = tolerance(onnx("fp32", "fp32"))
    assert limit.at(0) == limit
    assert limit.at(1000).logits < 1.01 * limit.logits
    far = limit.at(131_072)
    assert far.logits - limit.logits == far.states - limit.states == pytest.approx(2**-10)
