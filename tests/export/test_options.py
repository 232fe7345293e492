"""What a user can ask of an export, in each format."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.config import CONFIG_2B
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, model_tensors
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import (
    INT8_ROWS,
    Affine,
    Float,
    Ggml,
    Palette,
    Scheme,
    TwoLevel,
)
from tests.models import ODD_CONFIGS, make_config

REGULAR, NOT_BY_32 = ODD_CONFIGS["regular"], ODD_CONFIGS["not_by_32"]
LINEAR = "layers.0.mlp_block.up_proj.weight"
HALF, FULL = Float("float16"), Float("float32")
INT4 = Affine(4, 32, symmetric=True, scale="float16")
ASYMMETRIC = Affine(4, 64, symmetric=False, scale="float16")
BROWSER = Affine(4, 64, symmetric=False)
HEAD = Affine(8, 64, symmetric=True, scale="float16")
"""Blocks of 128, but that the rows have 64 weights."""
ONNX: list[tuple[dict[str, Any], Scheme, Scheme]] = [
    ({"block_size": 32}, INT4, HEAD),
    ({"block_size": 64}, Affine(4, 64, True, scale="float16"), HEAD),
    ({"symmetric": False}, Affine(4, 32, False, scale="float16"), HEAD),
    ({"precision": "fp32", "embedding_precision": "int8"}, FULL, HEAD),
    ({"profile": "wasm"}, INT8_ROWS, INT8_ROWS),
    ({"profile": "wasm", "precision": "int4"}, BROWSER, INT8_ROWS),
]
"""Options → schemes of a linear and of the embedding."""


@pytest.mark.parametrize(("options", "linear", "embedding"), ONNX)
def test_onnx(options: dict[str, Any], linear: Scheme, embedding: Scheme) -> None:
    """The head keeps its own defaults, unless it is stored in the precision of the linears."""
    plan = OnnxOptions(**options).resolve_plan(REGULAR)
    assert (plan[LINEAR], plan[EMBEDDING]) == (linear, embedding)


def test_the_default_int4_has_8_bits_where_4_lose_most() -> None:
    """Keys, values, one matrix of the first layer, and the rows of the tokens that come first."""
    ids = np.arange(REGULAR.vocab_size)[::-1]
    plan = OnnxOptions().resolve_plan(REGULAR, ids=ids)
    bits = {name: {one.level_bits for one in scheme.uniform} for name, scheme in plan.items()}
    in_8 = {name for name in bits if bits[name] == {8}}
    down = "layers.0.mlp_block.down_proj.weight"
    assert in_8 == {down, *(name for name in bits if re.search(r"\.[kv]_proj\.weight", name))}
    assert {name for name in bits if 4 in bits[name]} | in_8 == {
        name for name, spec in model_tensors(REGULAR).items() if spec.role in QUANTIZABLE
    }
    assert plan[LINEAR] == TwoLevel(4, 16)
    (_, eight, frequent), (_, four, _) = plan[EMBEDDING].row_groups(REGULAR.vocab_size)
    assert (eight, four) == (HEAD, TwoLevel(4, 16)) and set(frequent) == {*ids[: len(frequent)]}


def test_the_default_int8_has_small_blocks_for_frequent_tokens() -> None:
    ids = np.arange(REGULAR.vocab_size)[::-1]
    plan = OnnxOptions(precision="int8").resolve_plan(REGULAR, ids=ids)
    small, linear, large = (Affine(8, block, True, scale="float16") for block in (16, 32, 64))
    assert plan[LINEAR] == linear
    (_, first, frequent), (_, rest, rare) = plan[EMBEDDING].row_groups(REGULAR.vocab_size)
    assert (first, rest) == (small, large) and set(frequent) == {*ids[: len(frequent)]}
    assert len(frequent) == -(-len(ids) // 3) and len(frequent) + len(rare) == len(ids)


@pytest.mark.parametrize("asked", [None, 16, 128])
def test_blocks_fit_the_rows_of_each_tensor(asked: int | None) -> None:
    """None takes more bytes than the asked size would; tensors of one input have one size."""
    config = make_config("ra", width=288, heads=4, lru_width=300, mlp_width=40)
    options = OnnxOptions(precision="int4", embedding_precision="int4", block_size=asked)
    fitting = {288: 32, 300: 64, 40: 16}
    specs = model_tensors(config)
    for name, scheme in options.resolve_plan(config).items():
        if isinstance(scheme, Affine):
            assert scheme.block == min(asked or 32, fitting[specs[name].shape[1]]), name


@pytest.mark.parametrize("beside", [{"exact": True}, {"block_size": 32}, {"symmetric": False}])
def test_int8_rows_are_for_wasm_and_need_symmetric_weights(beside: dict[str, Any]) -> None:
    options = OnnxOptions(profile="wasm", precision="int8", **beside)
    expected = Affine(8, beside.get("block_size", 64), beside.get("symmetric", True))
    assert options.resolve_plan(REGULAR)[LINEAR] == expected
    plan = make_plan(REGULAR, INT8_ROWS, FULL)
    with pytest.raises(RequestError, match="as int8/row, which the profile webgpu does not have"):
        OnnxOptions(plan=plan, profile="webgpu")
    with pytest.raises(RequestError, match="leave out --exact, or take blocks"):
        OnnxOptions(plan=plan, profile="wasm", exact=True)


def test_odd_zero_points_are_not_for_webgpu() -> None:
    """A row of the embedding with an odd number of blocks would share a byte with the next one."""
    asked: dict[str, Any] = {"profile": "webgpu", "precision": "int4"}
    plan = OnnxOptions(**asked, block_size=64).resolve_plan(REGULAR)
    assert plan[EMBEDDING] == Affine(4, 64, symmetric=True) and plan[LINEAR] == BROWSER
    even = OnnxOptions(**asked, block_size=32, symmetric=False).resolve_plan(REGULAR)
    assert not even[EMBEDDING].symmetric
    options = OnnxOptions(**asked, block_size=64, symmetric=False)
    with pytest.raises(RequestError, match="rows of 64 are an odd number of blocks; store it as"):
        options.resolve_plan(REGULAR)


INT8 = Affine(8, None, symmetric=True, scale="float16")
COREML: list[tuple[dict[str, Any], Scheme, Scheme]] = [
    ({}, INT4, INT8),
    ({"precision": "fp16"}, HALF, HALF),
    ({"precision": "fp32"}, FULL, FULL),
    ({"precision": "pal4", "embedding_precision": "pal4"}, Palette(), Palette()),
    ({"precision": "int4", "symmetric": False, "block_size": 64}, ASYMMETRIC, INT8),
    ({"precision": "int8", "compute": "fp32"}, *(Affine(8, None, symmetric=True),) * 2),
]


@pytest.mark.parametrize(("options", "linear", "embedding"), COREML)
def test_coreml(options: dict[str, Any], linear: Scheme, embedding: Scheme) -> None:
    chosen = CoreMLOptions(**options)
    plan = chosen.resolve_plan(CONFIG_2B)
    assert (plan[LINEAR], plan[EMBEDDING]) == (linear, embedding)
    in_full = "fp32" in (options.get("precision"), options.get("compute"))
    assert chosen.compute_word == ("fp32" if in_full else "fp16")


def test_a_plan_of_another_format_is_fitted_for_coreml_and_stays_as_it_is_for_onnx() -> None:
    config = ODD_CONFIGS["not_by_128"]
    plan = make_plan(config, Affine(4, 128, symmetric=False), Palette(group=100, lut="float32"))
    options = CoreMLOptions(plan=plan)
    assert (options.precision_word, options.compute_word) == ("pal4", "fp16")
    fitted = options.resolve_plan(config)
    assert fitted[LINEAR] == Affine(4, 80, symmetric=False, scale="float16")
    assert fitted[EMBEDDING] == Palette(group=64)
    assert fitted["layers.0.mlp_block.up_proj.bias"] == HALF
    assert CoreMLOptions(plan=fitted).resolve_plan(config) == fitted
    plan = make_plan(REGULAR, Affine(4, 128, symmetric=True), Affine(8, 16, symmetric=True))
    assert OnnxOptions(plan=plan).resolve_plan(REGULAR) == plan


GGUF = make_config("rrar", width=256, heads=2, mlp_width=512)
TABLE, DOWN = "token_embd.weight", "blk.0.ffn_down.weight"
TYPES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "q6_k", "q4_k"),
    ({"type": "f16"}, "f16", "f16"),
    ({"type": "q4_0"}, "q6_k", "q4_0"),  # a mix has a better type for the embedding
    ({"type": "Q4_0", "pure": True}, "q4_0", "q4_0"),
    ({"type": "q4_0", "pure": True, "embedding_precision": "F16"}, "f16", "q4_0"),
    ({"type": "q4_0", "embedding_precision": "int4"}, "q4_k", "q4_0"),
    ({"type": "q4_0", "tensor_types": (r"blk\.0\.ffn_=Q8_0",)}, "q6_k", "q8_0"),
    ({"type": "q2_k", "algorithm": "gptq"}, "q6_k", "q3_k"),
    ({"plan": make_plan(GGUF, Ggml("q4_k"), HALF)}, "f16", "q4_k"),
]
"""Options → types of the embedding and of a linear."""


@pytest.mark.parametrize(("options", "embedding", "linear"), TYPES)
def test_gguf(options: dict[str, Any], embedding: str, linear: str) -> None:
    types = GgufOptions(**options).choose(GGUF).types
    assert (types[TABLE], types[DOWN]) == (embedding, linear)
    assert types["blk.0.ssm_a"] == types["blk.0.rg_lru_a_gate.weight"] == "f32"
    precisions = "int4", "int8", "fp16", "fp32"
    words = {word: GgufOptions(precision=word).file_type.name for word in precisions}
    assert words == {"int4": "q4_k_m", "int8": "q8_0", "fp16": "f16", "fp32": "f32"}


def algorithms(**options: Any) -> dict[str, str]:
    schemes = GgufOptions(**options).choose(GGUF).schemes
    return {name: schemes[name].algorithm for name in (TABLE, DOWN, "blk.0.ssm_a")}


def test_gptq_fills_quantized_types_and_other_algorithms_leave_them_to_ggml() -> None:
    ggml = dict.fromkeys((TABLE, DOWN, "blk.0.ssm_a"), "ggml")
    both = ggml | {TABLE: "gptq", DOWN: "gptq"}
    assert algorithms(type="q4_k_m", algorithm="gptq") == both
    plan = make_plan(GGUF, Ggml("q4_k", algorithm="gptq"), Ggml("q6_k"))
    assert algorithms(plan=plan, algorithm="search") == ggml
    assert algorithms(plan=plan) == ggml | {DOWN: "gptq"}
    assert algorithms(plan=plan, algorithm="gptq") == both


def test_gguf_options_that_contradict_each_other_or_change_nothing() -> None:
    with pytest.raises(RequestError, match="--imatrix and --calibration both"):
        GgufOptions(type="q4_k_m", imatrix=Path("x"), algorithm="gptq")
    idle: dict[str, Any] = {"pure": True, "imatrix": Path("x")}
    words = "--pure and --imatrix change nothing in a file of type q8_0"
    with pytest.raises(RequestError, match=words):
        GgufOptions(type="q8_0", **idle)
    GgufOptions(type="q8_0", tensor_types=("ffn_down=q4_k",), **idle)
    GgufOptions(type="f16", embedding_precision="q4_k", **idle)


BESIDE = {"precision": "int8", "block_size": 64, "symmetric": False, "embedding_precision": "int8"}
BESIDE_GGUF = dict(type="q4_0", pure=True, tensor_types=("a=q4_0",), embedding_precision="q4_0")
NOT_BESIDE = "leave out the precision, block size, symmetric, embedding precision$"
NOT_BESIDE_GGUF = "leave out the type, pure, tensor types, embedding precision$"
INT2, Q4_K, Q6_K = Affine(2, 32, True), Ggml("q4_k"), Ggml("q6_k")


@pytest.mark.parametrize(
    ("kind", "linear", "embedding", "options", "complaint"),
    [
        (OnnxOptions, FULL, INT4, BESIDE, NOT_BESIDE),
        (CoreMLOptions, FULL, INT4, BESIDE, NOT_BESIDE),
        (GgufOptions, Q4_K, Q4_K, BESIDE_GGUF, NOT_BESIDE_GGUF),
        (OnnxOptions, FULL, INT2, {}, "the profile cpu does not .* in 2, 3, 4, 5, 6, 8 bits"),
        (OnnxOptions, FULL, Palette(), {}, r"weight as \S+, which the profile cpu does not"),
        (OnnxOptions, FULL, Q6_K, {}, r"embed_tokens\.weight as q6_k, which only GGUF files have"),
        (CoreMLOptions, Q4_K, Q6_K, {}, r"embed_tokens\.weight as q6_k, which only GGUF"),
        (CoreMLOptions, INT4, FULL, {}, r"plan stores embed_tokens\.weight as float32"),
        (GgufOptions, Affine(4, 32, True), FULL, {}, "as int4/32, which GGUF cannot"),
        (GgufOptions, Q4_K, FULL, {}, r"as q4_k, .* cannot do for rows of 40; .* such as f16"),
    ],
)
def test_plans_that_are_refused(kind, linear, embedding, options, complaint):
    plan = make_plan(NOT_BY_32, linear, embedding)
    with pytest.raises(RequestError, match=complaint):
        asked = kind(plan=plan, **options)
        asked.choose(NOT_BY_32) if kind is GgufOptions else asked.resolve_plan(NOT_BY_32)
