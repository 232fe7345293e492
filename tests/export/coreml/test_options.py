import itertools
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.parts import part_layouts
from rgexport.griffin.layout import QUANTIZABLE, model_tensors
from rgexport.griffin.sizes import CONFIG_2B
from rgexport.quantize.plan import COREML_PRECISIONS, make_plan
from rgexport.quantize.scheme import Affine, Float, FloatDtype, Ggml, Palette, Plan, Scheme
from tests.models import ODD_CONFIGS

EMBEDDING = "embed_tokens.weight"
LINEAR = "layers.0.mlp_block.up_proj.weight"
INT8 = Affine(8, None, symmetric=True, scale="float16")
INT4 = Affine(4, 32, symmetric=True, scale="float16")


def plan_2b(**options: Any) -> Plan:
    return CoreMLOptions(**options).resolve_plan(CONFIG_2B)


@pytest.mark.parametrize(
    ("options", "linear", "embedding"),
    [
        ({}, INT4, INT8),
        ({"precision": "fp16"}, Float("float16"), Float("float16")),
        ({"precision": "fp32"}, Float("float32"), Float("float32")),
        ({"precision": "int8"}, INT8, INT8),
        ({"precision": "int4"}, INT4, INT8),
        ({"precision": "pal4"}, Palette(), INT8),
        ({"precision": "int4", "embedding_precision": "int4"}, INT4, INT4),
        ({"precision": "pal4", "embedding_precision": "pal4"}, Palette(), Palette()),
        ({"precision": "fp16", "embedding_precision": "int8"}, Float("float16"), INT8),
        (
            {"precision": "int4", "symmetric": False, "block_size": 64},
            Affine(4, 64, symmetric=False, scale="float16"),
            INT8,
        ),
        (
            {"precision": "pal4", "compute": "fp32"},
            Palette(lut="float32"),
            Affine(8, None, symmetric=True),
        ),
    ],
)
def test_words(options: dict[str, Any], linear: Scheme, embedding: Scheme) -> None:
    plan = plan_2b(**options)
    assert (plan[LINEAR], plan[EMBEDDING]) == (linear, embedding)


@pytest.mark.parametrize(
    ("precision", "compute", "dtype"),
    [
        *[(word, "fp32", "float32") for word in COREML_PRECISIONS],
        *[(word, "fp16", "float16") for word in COREML_PRECISIONS if word != "fp32"],
    ],
)
def test_biases_of_linears_follow_the_computation_and_all_else_is_float32(
    precision: str, compute: str, dtype: FloatDtype
) -> None:
    config = ODD_CONFIGS["regular"]
    plan = CoreMLOptions(precision=precision, compute=compute).resolve_plan(config)
    tensors = model_tensors(config)
    assert plan.keys() == tensors.keys()
    halves = set()
    for name, scheme in plan.items():
        if tensors[name].role in QUANTIZABLE:
            assert isinstance(scheme, Float) or dtype in (
                getattr(scheme, "scale", None),
                getattr(scheme, "lut", None),
            )
        elif scheme != Float("float32"):
            halves.add(name)
            assert scheme == Float("float16")
    linears = {n.removesuffix("weight") for n, spec in tensors.items() if spec.role == "linear"}
    biases = {f"{n}bias" for n in linears if f"{n}bias" in tensors}
    assert "layers.0.temporal_block.conv_1d.bias" in tensors.keys() - biases
    assert halves == (biases if compute == "fp16" else set())


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_every_plan_can_be_stored(name: str) -> None:
    words = [None, *COREML_PRECISIONS]
    shapes = {tensor: spec.shape for tensor, spec in model_tensors(ODD_CONFIGS[name]).items()}
    for precision, embedding, asymmetric in itertools.product(words, words, (False, True)):
        stored = {precision, embedding or {"int4": "int8", "pal4": "int8"}.get(str(precision))}
        options = CoreMLOptions(
            precision=precision,
            symmetric=not asymmetric if stored & {"int4", "int8"} else None,
            embedding_precision=embedding,
            compute="fp32",
        )
        plan = options.resolve_plan(ODD_CONFIGS[name])
        for tensor, shape in shapes.items():
            assert all(min(part) > 0 for _, part in part_layouts(shape, plan[tensor]).values())


def test_compute_follows_precision() -> None:
    words = {word: CoreMLOptions(precision=word).compute_word for word in COREML_PRECISIONS}
    assert words.pop("fp32") == "fp32"
    assert set(words.values()) == {"fp16"}
    assert CoreMLOptions(precision="int4", compute="fp32").compute_word == "fp32"
    assert CoreMLOptions().precision_word == "int4"


def test_a_plan_of_another_format_is_fitted() -> None:
    config = ODD_CONFIGS["not_by_128"]
    plan = make_plan(config, Affine(4, 128, symmetric=False), Palette(group=100, lut="float32"))
    options = CoreMLOptions(plan=plan)
    assert (options.precision_word, options.compute_word) == ("pal4", "fp16")
    found = options.resolve_plan(config)
    assert found[LINEAR] == Affine(4, 80, symmetric=False, scale="float16")
    assert found[EMBEDDING] == Palette(group=64)
    assert found["layers.0.mlp_block.up_proj.bias"] == Float("float16")
    assert CoreMLOptions(plan=found).resolve_plan(config) == found


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"compute": "bf16"}, "--compute is 'bf16'"),
        ({"precision": "fp32", "compute": "fp16"}, "products in fp16 take fp16 weights"),
        ({"precision": "int4", "embedding_precision": "fp32"}, "take --compute fp32"),
    ],
)
def test_wrong_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        CoreMLOptions(**options)


def test_nothing_stands_beside_a_plan() -> None:
    plan = make_plan(CONFIG_2B, Affine(4, 32, symmetric=True), Float("float32"))
    beside: dict[str, Any] = {"precision": "int8", "block_size": 64, "symmetric": False}
    words = "leave out the precision, block size, symmetric, embedding precision$"
    with pytest.raises(RequestError, match=words):
        CoreMLOptions(plan=plan, embedding_precision="int8", **beside)


def test_a_plan_for_gguf_is_refused() -> None:
    plan = make_plan(CONFIG_2B, Ggml("q4_k"), Ggml("q6_k"))
    with pytest.raises(RequestError, match=r"embed_tokens\.weight as q6_k, which only GGUF"):
        CoreMLOptions(plan=plan)


def test_a_plan_of_full_precision_takes_as_much_computation() -> None:
    plan = make_plan(CONFIG_2B, Affine(4, 32, symmetric=True), Float("float32"))
    with pytest.raises(RequestError, match=r"plan stores embed_tokens\.weight as float32"):
        CoreMLOptions(plan=plan).resolve_plan(CONFIG_2B)
    found = CoreMLOptions(plan=plan, compute="fp32").resolve_plan(CONFIG_2B)
    assert found[EMBEDDING] == Float("float32")
